#include "dense_order.cuh"
#include "drive.h"
#include "embedding_order.cuh"
#include "linear_order.cuh"

namespace pc::tests {

constexpr Asked<float> kMedian{Rule::kMedian, 0, 0, false};
constexpr Asked<float> kWinsorized{Rule::kWinsorizedMean, 1, 1, true};

template <typename Way>
void dense(int batch, int64_t size, const Asked<float>& asked) {
  const auto rows = numbers<float>(batch * size);
  std::vector<float> out(size);
  const int64_t wide = kOrderThreads * Way::owned;
  launch(dense_order_kernel<Way, float>, (size + wide - 1) / wide, kOrderThreads, 0, nullptr,
         rows.data(), out.data(), batch, size, asked);
}

// `held`: so few examples at a time that there are several stages.
template <typename Way>
void linear(int batch, int held, int64_t in, int64_t out, const Asked<float>& asked) {
  using Source = LinearSource<float, Way::owned>;
  const auto x = numbers<float>(batch * in), g = numbers<float>(batch * out);
  std::vector<float> result(in * out);
  const int64_t across = (in + kOrderWide - 1) / kOrderWide;
  const int64_t down = (out + Source::high - 1) / Source::high;
  launch(linear_order_kernel<Way, float>, across * down, kOrderThreads, held * Source::bytes,
         nullptr, x.data(), g.data(), result.data(), batch, in, out, held, asked);
}

// All look up row 0, then those of two rows in turns.
template <typename Way>
void embedding(int batch, int held, int64_t width, const Asked<float>& asked) {
  const auto g = numbers<float>(2 * batch * width);
  std::vector<float> table(3 * width);
  std::vector<int64_t> ids, places;
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t b = 0; b < batch; ++b) {
      if (row > 0 && b % 2 != row - 1) continue;
      ids.push_back(row);
      places.push_back(2 * b + (row > 0));
    }
  }
  const Lookups<float> lookups = {ids.data(), places.data(), g.data(), 2 * batch, 2, width};
  constexpr int64_t wide = kTableThreads * Way::owned;
  const int64_t tiles = (width + wide - 1) / wide;
  const int64_t parts = (lookups.count + kTableLookups - 1) / kTableLookups;
  launch(embedding_order_kernel<Way, float>, parts * tiles, kTableThreads,
         held * LookupSource<float, Way::owned>::bytes, nullptr, lookups, table.data(), int64_t{3},
         int64_t{-1}, batch, held, tiles, asked);
}

const Driven driven[] = {
    {"dense_order", [] { dense<Network<8>>(5, 131, kMedian); }},
    {"dense_order_ends", [] { dense<Ends<2, true>>(9, 131, kWinsorized); }},
    {"linear_order", [] { linear<Network<8>>(5, 5, 35, 5, kMedian); }},
    {"linear_order_in_stages", [] { linear<Streams<false>>(9, 4, 35, 5, kMedian); }},
    {"linear_order_ends", [] { linear<Ends<2, true>>(9, 4, 33, 17, kWinsorized); }},
    {"embedding_order", [] { embedding<Network<8>>(5, 5, 35, kMedian); }},
    {"embedding_order_in_stages", [] { embedding<Streams<false>>(9, 4, 35, kMedian); }},
    {"embedding_order_ends", [] { embedding<Ends<2, true>>(9, 4, 131, kWinsorized); }},
};

}  // namespace pc::tests
