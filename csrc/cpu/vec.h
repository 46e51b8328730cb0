// SIMD vectors of one width per build, written once for every instruction set and element type.
//
// Each build of these sources (see setup.py) sets CIBP_VECTOR_BYTES to 16, 32 or 64; GCC's and
// Clang's vector extensions then compile the same arithmetic to SSE2 or NEON, AVX2 or AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef CIBP_VECTOR_BYTES
#define CIBP_VECTOR_BYTES 16
#endif

namespace cibp {

template <class T>
using Vec __attribute__((vector_size(CIBP_VECTOR_BYTES))) = T;

// A number rounded to bfloat16: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// Two of them, which one lane of a product multiplies and adds up: in the lower half, and in the
// upper one.
struct Pair {
  uint32_t bits;
};

namespace detail {
template <class E>
struct Element {
  using Number = E;
  using Factor = E;
  using Factors = Vec<E>;
};
template <>
struct Element<BFloat16> {
  using Number = float;
  using Factor = Pair;
};
template <>
struct Element<Pair> {
  using Number = float;
  using Factors = Vec<uint32_t>;
};
}  // namespace detail

// What numbers stored as E are computed in, and what products of E or of pairs are summed in.
template <class E>
using Number = typename detail::Element<E>::Number;
// What one lane of a product takes of numbers that are stored as E, and how many numbers that is.
template <class E>
using Factor = typename detail::Element<E>::Factor;
template <class E>
constexpr int kPaired = std::is_same_v<E, BFloat16> ? 2 : 1;
// A vector of factors.
template <class F>
using Factors = typename detail::Element<F>::Factors;

template <class E>
constexpr int kLanes = CIBP_VECTOR_BYTES / static_cast<int>(sizeof(Number<E>));

// Registers that may hold accumulators: 32 with AVX-512, 16 elsewhere, less a few for operands.
constexpr int kAccumulators = CIBP_VECTOR_BYTES == 64 ? 24 : 12;

template <class F>
inline Factors<F> load(const F* p) {
  Factors<F> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class F>
inline void store(F* p, Factors<F> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` (at most kLanes) elements, zeros after them.
template <class T>
inline Vec<T> load_some(const T* p, int64_t count) {
  if (count == kLanes<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <class T>
inline void store_some(T* p, Vec<T> v, int64_t count) {
  if (count == kLanes<T>)
    store<T>(p, v);
  else
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0, not x + 0: keeps the sign of -0
}

template <class T>
inline T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// |v|: clears the sign bit.
template <class T>
inline Vec<T> absolute(Vec<T> v) {
  constexpr Bits<T> magnitude = ~(Bits<T>{1} << (8 * sizeof(T) - 1));
  Vec<Bits<T>> bits;
  std::memcpy(&bits, &v, sizeof v);
  bits &= broadcast<Bits<T>>(magnitude);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// upper - lower, and 0 where they are equal: also where both are the same infinity, as those of a
// class that a bias of -infinity masks. NaN stays NaN.
template <class V>
inline V difference(V lower, V upper) {
  return lower == upper ? V{} : upper - lower;
}

// Keeps v in a register: without it GCC folds one load into every multiply-add that uses it.
template <class V>
inline void pin(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__) && CIBP_VECTOR_BYTES == 16 || defined(__AVX__) && CIBP_VECTOR_BYTES == 32
  asm("" : "+x"(v));
#elif defined(__aarch64__) && CIBP_VECTOR_BYTES == 16
  asm("" : "+w"(v));
#else
  (void)v;  // nothing known, or (in tests) vectors of another CPU, that no register here holds
#endif
}

namespace detail {

// Lane j of the result: lane j of a where (j & H) == 0, else lane j - H of b (HIGH = false);
//                       lane j + H of a where (j & H) == 0, else lane j of b (HIGH = true).
template <class T, int H, bool HIGH, int... J>
inline Vec<T> exchange(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b,
                                 (HIGH ? (J & H ? L + J : J + H) : (J & H ? L + J - H : J))...);
#else
  return __builtin_shuffle(
      a, b, Vec<Bits<T>>{(HIGH ? (J & H ? L + J : J + H) : (J & H ? L + J - H : J))...});
#endif
}

template <class T, int H>
inline void transpose_stage(Vec<T>* rows) {
  if constexpr (H > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & H) continue;
      const Vec<T> a = rows[i], b = rows[i + H];
      rows[i] = exchange<T, H, false>(a, b, lanes);
      rows[i + H] = exchange<T, H, true>(a, b, lanes);
    }
    transpose_stage<T, H / 2>(rows);
  }
}

}  // namespace detail

// Transposes the kLanes x kLanes block in place.
template <class T>
inline void transpose(Vec<T>* rows) {
  detail::transpose_stage<T, kLanes<T> / 2>(rows);
}

}  // namespace cibp
