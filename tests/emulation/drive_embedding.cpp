#include "drive.h"
#include "embedding_reduce.cuh"

namespace pc::tests {

// Of B examples that look up rows in turns, in order.
struct Sample {
  Sample(int64_t rows, int64_t batch, int64_t positions, int64_t width)
      : g(numbers<float>(batch * positions * width)) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t place = row; place < batch * positions; place += rows) {
        ids.push_back(row);
        places.push_back(place);
      }
    }
  }

  std::vector<float> g;
  std::vector<int64_t> ids, places;
};

void reduce(int64_t rows, int64_t batch, int64_t positions, int64_t width, bool meet) {
  const Sample sample(rows, batch, positions, width);
  std::vector<float> coef(batch, 1), direction(rows * width, 1), sq_norms(batch), dots(batch),
      sum(rows * width), moment(rows * width), sign(rows * width), sum_dots(batch);
  const Lookups<float> in = {sample.ids.data(), sample.places.data(),
                             sample.g.data(),   batch * positions,
                             positions,         width};
  TableReduction<float> to = {rows,       -1, coef.data(), direction.data(), sq_norms.data(),
                              dots.data()};
  if (meet) {
    to.sum = sum.data();
    to.moment = moment.data();
    to.sign = sign.data();
    to.sum_dots = sum_dots.data();
  }
  std::vector<float> parts(to.per_example() * column_tiles(in, to.direction) * in.count);
  launch_embedding_reduce(in, to, parts.data(), nullptr);
}

const Driven driven[] = {
    {"embedding_segments", [] { reduce(3, 2, 5, 33, false); }},
    {"embedding_runs", [] { reduce(3, 2, 5, 68, true); }},
    {"embedding_long_runs", [] { reduce(1, 10, 7, 3, true); }},
};

}  // namespace pc::tests
