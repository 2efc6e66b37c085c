// Runs every driver that was linked in, or those named; fails if a comparison did.
#include "harness.h"

int main(int count, char** names) {
  for (const sanitize::Case& one : sanitize::cases()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(names[i], one.op) == 0;
    if (!wanted) continue;
    const int64_t before = sanitize::comparisons();
    one.run();
    std::printf("%s %lld", one.op, (long long)(sanitize::comparisons() - before));
    std::printf(", ");
  }
  std::printf("failures %lld\n", (long long)sanitize::failures());
  return sanitize::failures() != 0;
}
