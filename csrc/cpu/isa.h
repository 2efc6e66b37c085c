// One binary, three instruction sets: every `<op>_kernels.cpp` is compiled once for each, in a namespace of its own, and the best that the processor
// has is chosen at run time. PIX2REP_ISA=baseline|avx2|avx512 asks for a lower one.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define PIX2REP_X86 1
#else
#define PIX2REP_X86 0
#endif

namespace pix2rep {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if PIX2REP_X86
  const char* asked = std::getenv("PIX2REP_ISA");  // anything but avx512 and avx2 means baseline
  const bool allow_512 = asked == nullptr || std::strcmp(asked, "avx512") == 0;
  const bool allow_256 = allow_512 || std::strcmp(asked, "avx2") == 0;
  if (allow_512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (allow_256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa isa() {
  static const Isa chosen = best_isa();
  return chosen;
}

}  // namespace pix2rep

// Picks `symbol` of the namespace that fits this processor: PIX2REP_PICK(infonce_kernels) is a reference.
#if PIX2REP_X86
#define PIX2REP_PICK(symbol)                              \
  (::pix2rep::isa() == ::pix2rep::Isa::avx512 ? ::pix2rep::avx512::symbol \
   : ::pix2rep::isa() == ::pix2rep::Isa::avx2 ? ::pix2rep::avx2::symbol   \
                                              : ::pix2rep::baseline::symbol)
#else
#define PIX2REP_PICK(symbol) (::pix2rep::baseline::symbol)
#endif
