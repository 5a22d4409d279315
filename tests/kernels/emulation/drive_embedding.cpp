#include "drive.h"
#include "embedding_gram.cuh"
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
      weighted_sum(rows * width), second_moment(rows * width), sign_sum(rows * width),
      sum_dots(batch);
  const Lookups<float> in = {sample.ids.data(), sample.places.data(),
                             sample.g.data(),   batch * positions,
                             positions,         width};
  TableReduction<float> to = {rows,       -1, coef.data(), direction.data(), sq_norms.data(),
                              dots.data()};
  if (meet) {
    to.weighted_sum = weighted_sum.data();
    to.second_moment = second_moment.data();
    to.sign_sum = sign_sum.data();
    to.sum_dots = sum_dots.data();
  }
  std::vector<float> parts(parts_of(in, to));
  launch_embedding_reduce(in, to, parts.data(), nullptr);
}

// Of B examples that look up the same rows, with twice as many others.
void gram(int64_t batch, int64_t positions, int64_t width, bool same) {
  const auto g = numbers<float>(2 * batch * positions * width);
  std::vector<int64_t> ids, places;
  for (int64_t b = 0; b < 2 * batch; ++b) {
    for (int64_t t = 0; t < positions; ++t) {
      ids.push_back(t / 2);
      places.push_back(t);
    }
  }
  const ExampleLookups<float> one = {ids.data(), places.data(), g.data(), batch, positions, width};
  ExampleLookups<float> two = one;
  two.batch = 2 * batch;
  std::vector<float> sums(3 * batch * positions * width), out(batch * 2 * batch);
  launch_embedding_gram(one, same ? nullptr : &two, positions, 1, std::min<int64_t>(width, 32),
                        sums.data(), out.data(), nullptr);
}

const Driven driven[] = {
    {"embedding_segments", [] { reduce(3, 2, 5, 33, false); }},
    {"embedding_runs", [] { reduce(3, 2, 5, 68, true); }},
    {"embedding_long_runs", [] { reduce(1, 10, 7, 3, true); }},
    {"embedding_gram", [] { gram(2, 70, 35, true); }},
    {"embedding_gram_of_two", [] { gram(1, 3, 72, false); }},
};

}  // namespace pc::tests
