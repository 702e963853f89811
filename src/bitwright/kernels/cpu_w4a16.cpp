// out = x W^T with 4-bit weights, for processors with AVX-512 BF16.
//
// The layout is CpuWeight's (layouts.py). One vector of packed words holds 16 output channels x 8
// input columns; shifting it by 0, 4, 8, 12 bits and one vpermw (a table of 16 bfloat16, twice, so
// that the bit above the nibble does not matter) give four operands of vdpbf16ps. Products are
// exact, sums are float32; a group's sum is scaled once, so that weights are never rounded.
//
// Few rows: operands stay in registers. More rows: 128 columns x 64 channels (16 KB) are expanded
// into the first-level cache and used by every row. The whole weight is expanded nowhere.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 64, VECTORS = 4, DEEP = 128, ROWS = 6, CHUNK = 96;

enum Kind : int { BF16 = 0, FP16 = 1, FP32 = 2 };

inline float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __m512 load_scale(const void* base, int64_t at, int kind) {
  if (kind == FP32) return _mm512_loadu_ps(static_cast<const float*>(base) + at);
  __m256i half = _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + at));
  if (kind == FP16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }

// Two instructions: reading the table straight from a shifted vector.
template <int S>
inline __m512bh operand(__m512i word, __m512i table) {
  return as_bf16(_mm512_permutexvar_epi16(S ? _mm512_srli_epi16(word, 4 * S) : word, table));
}

struct Scales {
  const void* scale;
  int kind;
  const uint8_t* zero;
};

template <int R>
inline void add_group(__m512 (&sum)[R][VECTORS], float* total, const Scales& s, int64_t at,
                      const float* x_sum, int64_t x_stride) {
  for (int j = 0; j < VECTORS; ++j) {
    __m512 scale = load_scale(s.scale, at + 16 * j, s.kind);
    __m512 zero = _mm512_setzero_ps();
    if (s.zero)
      zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(s.zero + at + 16 * j))));
    for (int r = 0; r < R; ++r) {
      __m512 value = sum[r][j];
      if (s.zero) value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x_sum[r * x_stride]), value);
      float* place = total + r * LANES + 16 * j;
      _mm512_storeu_ps(place, _mm512_fmadd_ps(scale, value, _mm512_loadu_ps(place)));
    }
  }
}

// R rows, 64 channels, `steps` times 8 columns: words straight from memory.
template <int R>
void direct(const int16_t* words, int64_t steps, __m512i table, const uint32_t* x, float* total,
            const Scales& s, int64_t at, const float* x_sum, int64_t x_stride) {
  __m512 sum[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k, words += VECTORS * 32, x += 4 * R) {
    _mm_prefetch(reinterpret_cast<const char*>(words) + 4096, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(words) + 4160, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(words) + 4224, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(words) + 4288, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      __m512i word = _mm512_loadu_si512(words + 32 * j);
      __m512bh w0 = operand<0>(word, table), w1 = operand<1>(word, table);
      __m512bh w2 = operand<2>(word, table), w3 = operand<3>(word, table);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], as_bf16(_mm512_set1_epi32(x[r])), w0);
        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], as_bf16(_mm512_set1_epi32(x[R + r])), w1);
        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], as_bf16(_mm512_set1_epi32(x[2 * R + r])), w2);
        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], as_bf16(_mm512_set1_epi32(x[3 * R + r])), w3);
      }
    }
  }
  add_group<R>(sum, total, s, at, x_sum, x_stride);
}

void expand(const int16_t* words, int64_t steps, __m512i table, __m512i* panel) {
  for (int64_t k = 0; k < steps; ++k, words += VECTORS * 32, panel += 4 * VECTORS) {
    for (int j = 0; j < VECTORS; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(words + 32 * j) + 2048, _MM_HINT_T0);
      __m512i word = _mm512_loadu_si512(words + 32 * j);
      panel[j] = (__m512i)operand<0>(word, table);
      panel[VECTORS + j] = (__m512i)operand<1>(word, table);
      panel[2 * VECTORS + j] = (__m512i)operand<2>(word, table);
      panel[3 * VECTORS + j] = (__m512i)operand<3>(word, table);
    }
  }
}

// R rows, 64 channels, `pairs` pairs of columns of an expanded panel.
template <int R>
void from_panel(const __m512i* panel, int64_t pairs, const uint32_t* x, float* total,
                const Scales& s, int64_t at, const float* x_sum, int64_t x_stride) {
  __m512 sum[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, panel += VECTORS, x += R) {
    __m512bh w0 = as_bf16(panel[0]), w1 = as_bf16(panel[1]);
    __m512bh w2 = as_bf16(panel[2]), w3 = as_bf16(panel[3]);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      __m512bh a = as_bf16(_mm512_set1_epi32(x[r]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, w0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, w1);
      sum[r][2] = _mm512_dpbf16_ps(sum[r][2], a, w2);
      sum[r][3] = _mm512_dpbf16_ps(sum[r][3], a, w3);
    }
  }
  add_group<R>(sum, total, s, at, x_sum, x_stride);
}

#define BY_ROWS(CALL)          \
  switch (rows) {              \
    case 1: CALL(1); break;    \
    case 2: CALL(2); break;    \
    case 3: CALL(3); break;    \
    case 4: CALL(4); break;    \
    case 5: CALL(5); break;    \
    default: CALL(6); break;   \
  }

// Up to 16 values, rounded to nearest even.
inline void store(void* out, int64_t at, __m512 value, __mmask16 lanes, int kind) {
  if (kind == FP32) {
    _mm512_mask_storeu_ps(static_cast<float*>(out) + at, lanes, value);
    return;
  }
  __m256i half;
  if (kind == FP16) {
    half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  } else {  // not vcvtneps2bf16, which takes subnormal numbers for zero
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    sum = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, lanes, half);
}

}  // namespace

// x: bfloat16 (terms, m, k), the terms of one input to be added up; out: (m, n) of out_kind.
// words, scale, zero, table: CpuWeight's; bias: float (n) or null; group divides k, 8 divides it.
extern "C" void w4a16(const uint16_t* x, int64_t terms, int64_t m, int64_t k, const int16_t* words,
                      const void* scale, int scale_kind, const uint8_t* zero,
                      const uint16_t* table16, const float* bias, float factor, void* out,
                      int out_kind, int64_t n, int64_t group, int threads) {
  const int64_t tiles = (n + LANES - 1) / LANES, groups = k / group, pairs = k / 2;
  alignas(64) uint16_t twice[32];
  for (int i = 0; i < 32; ++i) twice[i] = table16[i & 15];
  const __m512i table = _mm512_load_si512(twice);
  const int64_t deep = std::min<int64_t>(group, DEEP);
  const int64_t slices = (group + deep - 1) / deep;
  std::vector<uint32_t> packed;
  std::vector<float> x_sum;

  for (int64_t m0 = 0; m0 < m; m0 += CHUNK) {
    const int64_t real = std::min<int64_t>(CHUNK, m - m0), count = real * terms;
    const int64_t blocks = (count + ROWS - 1) / ROWS;
    auto first_row = [&](int64_t b) { return b * count / blocks; };
    auto source = [&](int64_t v) { return x + ((v / real) * m + m0 + v % real) * k; };
    packed.resize(count * pairs);
    x_sum.assign(count * groups * slices, 0.0f);
#pragma omp parallel for num_threads(threads) if (count > 8)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = first_row(b), rows = first_row(b + 1) - begin;
      for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* row = source(begin + r);
        for (int64_t column = 0, width; column < k; column += width) {
          width = std::min(deep, group - column % group);
          uint32_t* place = packed.data() + column / 2 * count + begin * width / 2 + r;
          for (int64_t p = 0; p < width / 2; ++p)
            std::memcpy(place + p * rows, row + column + 2 * p, 4);
        }
        if (!zero) continue;
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t c = 0; c < slices; ++c) {
            float sum = 0;
            const int64_t end = g * group + std::min(group, (c + 1) * deep);
            for (int64_t i = g * group + c * deep; i < end; ++i) sum += widen(row[i]);
            x_sum[((begin + r) * groups + g) * slices + c] = sum;
          }
      }
    }
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> total(count * LANES);
      std::vector<__m512i> storage(blocks > 1 ? deep / 2 * VECTORS + 1 : 0);
      __m512i* panel = storage.data();
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tiles; ++t) {
        std::fill(total.begin(), total.end(), 0.0f);
        const int16_t* tile = words + t * (k / 8) * VECTORS * 32;
        for (int64_t g = 0; g < groups; ++g) {
          const Scales s{scale, scale_kind, zero};
          const int64_t at = (t * groups + g) * LANES;
          for (int64_t c = 0; c < slices; ++c) {
            const int64_t column = g * group + c * deep;
            const int64_t steps = (std::min(deep, group - c * deep)) / 8;
            const int16_t* here = tile + column / 8 * VECTORS * 32;
            if (blocks > 1) expand(here, steps, table, panel);
            for (int64_t b = 0; b < blocks; ++b) {
              const int64_t begin = first_row(b), rows = first_row(b + 1) - begin;
              const uint32_t* xs = packed.data() + column / 2 * count + begin * steps * 4;
              const float* sums = x_sum.data() + (begin * groups + g) * slices + c;
              float* sum = total.data() + begin * LANES;
              const int64_t stride = groups * slices;
              if (blocks > 1) {
#define PANEL(R) from_panel<R>(panel, 4 * steps, xs, sum, s, at, sums, stride)
                BY_ROWS(PANEL)
              } else {
#define DIRECT(R) direct<R>(here, steps, table, xs, sum, s, at, sums, stride)
                BY_ROWS(DIRECT)
              }
            }
          }
        }
        const int64_t channels = std::min<int64_t>(LANES, n - t * LANES);
        for (int64_t j = 0; j < channels; j += 16) {
          const __mmask16 lanes = channels - j < 16 ? (1u << (channels - j)) - 1 : 0xffff;
          const __m512 extra = bias ? _mm512_maskz_loadu_ps(lanes, bias + t * LANES + j)
                                    : _mm512_setzero_ps();
          for (int64_t r = 0; r < real; ++r) {
            __m512 value = _mm512_loadu_ps(total.data() + r * LANES + j);
            for (int64_t e = 1; e < terms; ++e)
              value = _mm512_add_ps(value, _mm512_loadu_ps(&total[(e * real + r) * LANES + j]));
            value = _mm512_fmadd_ps(value, _mm512_set1_ps(factor), extra);
            store(out, (m0 + r) * n + t * LANES + j, value, lanes, out_kind);
          }
        }
      }
    }
  }
}
