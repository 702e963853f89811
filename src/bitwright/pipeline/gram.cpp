// Lower triangle of X^T X for bfloat16 X, for processors with AVX-512 BF16.
//
// Pairs of tokens are interleaved (the operand order of vdpbf16ps) in blocks of 48 channels; a
// tile of 48 x 48 sums is six times 8 x 48, in 24 registers. Products are exact, sums float32.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 48, VECTORS = 3, ROWS = 8;
constexpr int64_t DEEP = 512;  // pairs of tokens whose operands stay in the second-level cache

// `sum` (8 of 48 x 48) += a^T b over `pairs` pairs; a begins at the first of 8 channels.
void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sum) {
  __m512 part[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < VECTORS; ++j) part[r][j] = _mm512_loadu_ps(sum + r * BLOCK + 16 * j);
  for (int64_t p = 0; p < pairs; ++p, a += BLOCK, b += BLOCK) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
    const __m512bh b2 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh value = (__m512bh)_mm512_set1_epi32(a[r]);
      part[r][0] = _mm512_dpbf16_ps(part[r][0], value, b0);
      part[r][1] = _mm512_dpbf16_ps(part[r][1], value, b1);
      part[r][2] = _mm512_dpbf16_ps(part[r][2], value, b2);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(sum + r * BLOCK + 16 * j, part[r][j]);
}

}  // namespace

// x: bfloat16 (tokens, width), rows of `stride` values; gram: float (width, width), added to.
extern "C" void add_gram(const uint16_t* x, int64_t tokens, int64_t width, int64_t stride,
                         float* gram, int threads) {
  const int64_t blocks = (width + BLOCK - 1) / BLOCK, pairs = (tokens + 1) / 2;
  std::vector<uint32_t> packed(blocks * pairs * BLOCK);
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t channels = std::min(BLOCK, width - c * BLOCK);
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* even = x + 2 * p * stride + c * BLOCK;
      const uint16_t* odd = even + stride;
      uint32_t* place = &packed[(c * pairs + p) * BLOCK];
      const bool both = 2 * p + 1 < tokens;
      for (int64_t i = 0; i < channels; ++i)
        place[i] = even[i] | (both ? uint32_t(odd[i]) << 16 : 0);
    }
  }
  // Tiles by falling length of a row, so that threads end together.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t n = 0; n < blocks * (blocks + 1) / 2; ++n) {
    int64_t row = blocks - 1, column = n;
    for (; column > row; --row) column -= row + 1;
    alignas(64) float sum[BLOCK * BLOCK] = {};
    for (int64_t p = 0; p < pairs; p += DEEP)
      for (int64_t r = 0; r < BLOCK; r += ROWS)
        multiply(&packed[(row * pairs + p) * BLOCK + r], &packed[(column * pairs + p) * BLOCK],
                 std::min(DEEP, pairs - p), sum + r * BLOCK);
    const int64_t wide = std::min(BLOCK, width - column * BLOCK);
    for (int64_t i = 0; i < std::min(BLOCK, width - row * BLOCK); ++i) {
      float* place = gram + (row * BLOCK + i) * width + column * BLOCK;
      for (int64_t j = 0; j < wide; ++j) place[j] += sum[i * BLOCK + j];
    }
  }
}
