// Rows of any storage to float or double and back. Included by `crosscorr_kernels.cpp` inside its namespace; conversions go by bits, so that every
// instruction set vectorises them, and round to nearest even.

namespace {

struct Half {
  uint16_t bits;
  operator float() const {
    // The exponent's bias moves by a product, which is exact for denormals too; inf and NaN need theirs set.
    const uint32_t magnitude = uint32_t(bits & 0x7fffu) << 13;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return as_float(as_bits(as_float(magnitude) * 0x1p112f) | special | uint32_t(bits & 0x8000u) << 16);
  }
  static Half of(float x) {
    const uint32_t sign = as_bits(x) & 0x80000000u, magnitude = as_bits(x) ^ sign;
    const uint32_t odd = (magnitude >> 13) & 1;
    const uint32_t normal = (magnitude + 0xfffu + odd - 0x38000000u) >> 13;
    const uint32_t denormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the last bit of a sum in [0.5, 1) weighs 2^-24
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude < 0x477ff000u ? half : 0x7c00u;
    half = magnitude <= 0x7f800000u ? half : 0x7e00u;
    return {uint16_t(half | sign >> 16)};
  }

  static float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  static uint32_t as_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
  }
};

struct Brain {
  uint16_t bits;
  operator float() const { return Half::as_float(uint32_t(bits) << 16); }
  static Brain of(float x) {
    const uint32_t wide = Half::as_bits(x);
    return {uint16_t(x == x ? (wide + 0x7fffu + ((wide >> 16) & 1)) >> 16 : 0x7fc0u)};
  }
};

template <class S, class T>
static void read_as(const char* row, int64_t column_bytes, int64_t d, T* __restrict out) {
  if (column_bytes == int64_t(sizeof(S))) {
    const S* from = reinterpret_cast<const S*>(row);
    for (int64_t i = 0; i < d; ++i) out[i] = T(from[i]);
  } else {
    for (int64_t i = 0; i < d; ++i) out[i] = T(*reinterpret_cast<const S*>(row + i * column_bytes));
  }
}

template <class T>
void read(const char* row, int64_t column_bytes, Storage storage, int64_t d, T* out) {
  switch (storage) {
    case Storage::f16:
      return read_as<Half>(row, column_bytes, d, out);
    case Storage::bf16:
      return read_as<Brain>(row, column_bytes, d, out);
    case Storage::f32:
      return read_as<float>(row, column_bytes, d, out);
    case Storage::f64:
      return read_as<double>(row, column_bytes, d, out);
  }
}

template <class S, class T>
static void write_as(const T* __restrict row, int64_t d, char* out) {
  S* to = reinterpret_cast<S*>(out);
  for (int64_t i = 0; i < d; ++i) {
    if constexpr (sizeof(S) == 2)
      to[i] = S::of(float(row[i]));
    else
      to[i] = S(row[i]);
  }
}

template <class T>
void write(const T* row, Storage storage, int64_t d, char* out) {
  switch (storage) {
    case Storage::f16:
      return write_as<Half>(row, d, out);
    case Storage::bf16:
      return write_as<Brain>(row, d, out);
    case Storage::f32:
      return write_as<float>(row, d, out);
    case Storage::f64:
      return write_as<double>(row, d, out);
  }
}

}  // namespace
