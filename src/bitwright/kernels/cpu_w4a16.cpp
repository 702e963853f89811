// out = x W^T with 4-bit weights, for processors with AVX-512 BF16.
//
// The layout is CpuWeight's (layouts.py). One vector of packed words holds 16 output channels x 8
// input columns; shifting it by 0, 4, 8, 12 bits and one vpermw (a table of 16 bfloat16, twice, so
// that the bit above the nibble does not matter) give four operands of vdpbf16ps. Products are
// exact, sums are float32; a group's sum is scaled, so that weights are never rounded.
//
// Up to 6 rows x 64 channels are summed in 24 registers across groups: at the end of a group its
// sums are brought to the next group's scale by one multiplication each. Operands go from the
// table to the product in registers; no part of the weight is ever expanded in memory.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 64, VECTORS = 4, WORDS = 32, ROWS = 6, CHUNK = 384;
constexpr int64_t SLICE = 2048;  // columns whose words and inputs stay in the second-level cache

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

// One pair of columns (of 4 in a step): R rows x 64 channels.
template <int R, int S>
inline void add_pair(__m512 (&sum)[R][VECTORS], const __m512i (&word)[VECTORS], __m512i table,
                     const uint32_t* x) {
  const __m512bh w0 = operand<S>(word[0], table), w1 = operand<S>(word[1], table);
  const __m512bh w2 = operand<S>(word[2], table), w3 = operand<S>(word[3], table);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const __m512bh a = as_bf16(_mm512_set1_epi32(x[S * R + r]));
    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, w0);
    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, w1);
    sum[r][2] = _mm512_dpbf16_ps(sum[r][2], a, w2);
    sum[r][3] = _mm512_dpbf16_ps(sum[r][3], a, w3);
  }
}

// Consecutive pieces of columns, each inside one group, and the 64 channels' values for them.
struct Run {
  const int64_t* steps;  // 8 columns each
  int64_t pieces;
  const float* unit;  // (pieces, 64): what a piece's sums are multiplied by when it ends
  const float* zero;  // (pieces, 64) or null
  const float* x_sum;  // (rows, all pieces) sums of inputs
  int64_t x_stride;
};

// R rows x 64 channels over a run, added to `total`.
template <int R>
void product(const int16_t* words, const Run& run, __m512i table, const uint32_t* x,
             float* total) {
  __m512 sum[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < run.pieces; ++i) {
    for (int64_t k = 0; k < run.steps[i]; ++k, words += VECTORS * WORDS, x += 4 * R) {
      __m512i word[VECTORS];
      for (int j = 0; j < VECTORS; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(words + WORDS * j) + 4096, _MM_HINT_T0);
        word[j] = _mm512_loadu_si512(words + WORDS * j);
      }
      add_pair<R, 0>(sum, word, table, x);
      add_pair<R, 1>(sum, word, table, x);
      add_pair<R, 2>(sum, word, table, x);
      add_pair<R, 3>(sum, word, table, x);
    }
    for (int j = 0; j < VECTORS; ++j) {
      const __m512 unit = _mm512_loadu_ps(run.unit + i * LANES + 16 * j);
      __m512 zero = _mm512_setzero_ps();
      if (run.zero) zero = _mm512_loadu_ps(run.zero + i * LANES + 16 * j);
      for (int r = 0; r < R; ++r) {
        if (run.zero)
          sum[r][j] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(run.x_sum[r * run.x_stride + i]),
                                       sum[r][j]);
        sum[r][j] = _mm512_mul_ps(sum[r][j], unit);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < VECTORS; ++j) {
      float* place = total + r * LANES + 16 * j;
      _mm512_storeu_ps(place, _mm512_add_ps(sum[r][j], _mm512_loadu_ps(place)));
    }
}

void product(int64_t rows, const int16_t* words, const Run& run, __m512i table, const uint32_t* x,
             float* total) {
  switch (rows) {
    case 1: return product<1>(words, run, table, x, total);
    case 2: return product<2>(words, run, table, x, total);
    case 3: return product<3>(words, run, table, x, total);
    case 4: return product<4>(words, run, table, x, total);
    case 5: return product<5>(words, run, table, x, total);
    default: return product<6>(words, run, table, x, total);
  }
}

// Scales of one tile's consecutive groups and how far sums can stay in registers.
struct Units {
  std::vector<float> unit, zero;
  std::vector<int64_t> ends;  // of the runs: where scales leave each other's range, and the last

  void load(const void* scale, int kind, const uint8_t* zeros, int64_t at, const int64_t* group,
            int64_t pieces) {
    unit.resize(pieces * LANES);
    zero.resize(zeros ? pieces * LANES : 0);
    ends.clear();
    __m512 first[VECTORS];
    for (int64_t i = 0, begin = 0; i < pieces; ++i) {
      __m512 here[VECTORS], next[VECTORS];
      bool on = i + 1 < pieces;
      for (int j = 0; j < VECTORS; ++j) {
        here[j] = load_scale(scale, at + group[i] * LANES + 16 * j, kind);
        if (i == begin) first[j] = here[j];
        if (i + 1 == pieces) continue;
        next[j] = load_scale(scale, at + group[i + 1] * LANES + 16 * j, kind);
        const __m512 ratio = _mm512_abs_ps(_mm512_div_ps(first[j], next[j]));
        on &= _mm512_cmp_ps_mask(ratio, _mm512_set1_ps(0x1p40f), _CMP_LT_OQ) == 0xffff &&
              _mm512_cmp_ps_mask(ratio, _mm512_set1_ps(0x1p-40f), _CMP_GT_OQ) == 0xffff;
      }
      for (int j = 0; j < VECTORS; ++j) {
        _mm512_storeu_ps(&unit[i * LANES + 16 * j], on ? _mm512_div_ps(here[j], next[j]) : here[j]);
        if (!zeros) continue;
        const __m128i codes = _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(zeros + at + group[i] * LANES + 16 * j));
        _mm512_storeu_ps(&zero[i * LANES + 16 * j],
                         _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)));
      }
      if (!on) ends.push_back(begin = i + 1);
    }
  }
};

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

// Columns in pieces of one group each, and slices of consecutive pieces.
struct Pieces {
  std::vector<int64_t> column, steps, group, slices{0};  // slices: where each begins; the end

  Pieces(int64_t k, int64_t size) {
    for (int64_t at = 0, filled = 0, width; at < k; at += width, filled += width) {
      width = std::min(size - at % size, SLICE);
      if (filled && filled + width > SLICE) {
        slices.push_back(column.size());
        filled = 0;
      }
      column.push_back(at);
      steps.push_back(width / 8);
      group.push_back(at / size);
    }
    slices.push_back(column.size());
    column.push_back(k);
  }
};

}  // namespace

// x: bfloat16 (terms, m, k), the terms of one input to be added up; out: (m, n) of out_kind.
// words, scale, zero, table: CpuWeight's; bias: float (n) or null; group divides k, 8 divides it.
extern "C" void w4a16(const uint16_t* x, int64_t terms, int64_t m, int64_t k, const int16_t* words,
                      const void* scale, int scale_kind, const uint8_t* zero,
                      const uint16_t* table16, const float* bias, float factor, void* out,
                      int out_kind, int64_t n, int64_t group, int threads) {
  const int64_t tiles = (n + LANES - 1) / LANES, groups = k / group, pairs = k / 2;
  const Pieces pieces(k, group);
  const int64_t all = pieces.steps.size(), slices = pieces.slices.size() - 1;
  alignas(64) uint16_t twice[32];
  for (int i = 0; i < 32; ++i) twice[i] = table16[i & 15];
  const __m512i table = _mm512_load_si512(twice);
  std::vector<uint32_t> packed;
  std::vector<float> x_sum;

  for (int64_t m0 = 0; m0 < m; m0 += CHUNK) {
    const int64_t real = std::min<int64_t>(CHUNK, m - m0), count = real * terms;
    const int64_t blocks = (count + ROWS - 1) / ROWS;
    auto first_row = [&](int64_t b) { return b * count / blocks; };
    auto source = [&](int64_t v) { return x + ((v / real) * m + m0 + v % real) * k; };
    auto slice_begin = [&](int64_t s) { return pieces.column[pieces.slices[s]]; };
    packed.resize(count * pairs);
    x_sum.resize(zero ? count * all : 0);
    // Inputs in the order they are read: slice, block of rows, pair of columns, row.
#pragma omp parallel for num_threads(threads) if (count > 8)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = first_row(b), rows = first_row(b + 1) - begin;
      for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* row = source(begin + r);
        for (int64_t s = 0; s < slices; ++s) {
          const int64_t column = slice_begin(s), width = slice_begin(s + 1) - column;
          uint32_t* place = packed.data() + column / 2 * count + begin * width / 2 + r;
          for (int64_t p = 0; p < width / 2; ++p)
            std::memcpy(place + p * rows, row + column + 2 * p, 4);
        }
        if (!zero) continue;
        for (int64_t i = 0; i < all; ++i) {
          float sum = 0;
          for (int64_t c = pieces.column[i]; c < pieces.column[i + 1]; ++c) sum += widen(row[c]);
          x_sum[(begin + r) * all + i] = sum;
        }
      }
    }
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> total(count * LANES);
      Units units;
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tiles; ++t) {
        std::fill(total.begin(), total.end(), 0.0f);
        const int16_t* tile = words + t * (k / 8) * VECTORS * WORDS;
        for (int64_t s = 0; s < slices; ++s) {
          const int64_t first = pieces.slices[s], column = slice_begin(s);
          const int64_t width = slice_begin(s + 1) - column;
          units.load(scale, scale_kind, zero, t * groups * LANES, &pieces.group[first],
                     pieces.slices[s + 1] - first);
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t begin = first_row(b), rows = first_row(b + 1) - begin;
            const uint32_t* xs = packed.data() + column / 2 * count + begin * width / 2;
            int64_t i = 0;
            for (int64_t end : units.ends) {
              const int64_t at = pieces.column[first + i];
              const Run run{&pieces.steps[first + i], end - i, &units.unit[i * LANES],
                            zero ? &units.zero[i * LANES] : nullptr,
                            zero ? &x_sum[begin * all + first + i] : nullptr, all};
              product(rows, tile + at / 8 * VECTORS * WORDS, run, table,
                      xs + (at - column) / 2 * rows, &total[begin * LANES]);
              i = end;
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
