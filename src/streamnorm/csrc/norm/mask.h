// Masks: counting what they keep, copying it together, and copying results back to where it lay.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr uint64_t eight_ones = 0x0101010101010101;

// Eight places of a mask, the first in the lowest byte, each of them 0 or 1.
inline uint64_t eight_of(const uint8_t* mask) {
  constexpr uint64_t below_sign = 0x7f * eight_ones;
  uint64_t bytes;
  memcpy(&bytes, mask, sizeof bytes);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  bytes = __builtin_bswap64(bytes);
#endif
  return (((bytes & below_sign) + below_sign) | bytes) >> 7 & eight_ones;
}

inline int64_t count_kept(const uint8_t* mask, int64_t n) {
  int64_t kept = 0, i = 0;
  for (; i + 8 <= n; i += 8) kept += (int64_t)(eight_of(mask + i) * eight_ones >> 56);
  for (; i < n; i++) kept += mask[i] != 0;
  return kept;
}

// Copy together what a mask keeps of n elements; how many these are. `to` has room for one element more.
template <class T> int64_t gather_kept(const uint8_t* mask, int64_t n, const T* from, T* to) {
  int64_t kept = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint64_t places = eight_of(mask + i);
    if (places == eight_ones) {
      memcpy(to + kept, from + i, 8 * sizeof(T));
      kept += 8;
    } else if (places) {
      for (int k = 0; k < 8; k++) to[kept] = from[i + k], kept += places >> 8 * k & 1;
    }
  }
  for (; i < n; i++) to[kept] = from[i], kept += mask[i] != 0;
  return kept;
}
// And back: zeros where the mask keeps nothing. T is unsigned; `from` may be read one element further.
template <class T> int64_t scatter_kept(const uint8_t* mask, int64_t n, const T* from, T* to) {
  int64_t kept = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint64_t places = eight_of(mask + i);
    if (places == eight_ones) {
      memcpy(to + i, from + kept, 8 * sizeof(T));
      kept += 8;
    } else if (!places) {
      memset(to + i, 0, 8 * sizeof(T));
    } else {
      for (int k = 0; k < 8; k++) {
        const T keep = places >> 8 * k & 1;
        to[i + k] = from[kept] & (T)-keep;
        kept += keep;
      }
    }
  }
  for (; i < n; i++) {
    const T keep = mask[i] != 0;
    to[i] = from[kept] & (T)-keep;
    kept += keep;
  }
  return kept;
}

// The same for elements of so many bytes.
inline int64_t gather_kept(int64_t width, const uint8_t* mask, int64_t n, const void* from, void* to) {
  return width == 2   ? gather_kept(mask, n, (const uint16_t*)from, (uint16_t*)to)
         : width == 4 ? gather_kept(mask, n, (const uint32_t*)from, (uint32_t*)to)
                      : gather_kept(mask, n, (const uint64_t*)from, (uint64_t*)to);
}
inline int64_t scatter_kept(int64_t width, const uint8_t* mask, int64_t n, const void* from, void* to) {
  return width == 2   ? scatter_kept(mask, n, (const uint16_t*)from, (uint16_t*)to)
         : width == 4 ? scatter_kept(mask, n, (const uint32_t*)from, (uint32_t*)to)
                      : scatter_kept(mask, n, (const uint64_t*)from, (uint64_t*)to);
}

}  // namespace
