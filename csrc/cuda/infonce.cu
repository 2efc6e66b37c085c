// pix2rep_native::infonce and infonce_backward on the GPU: prepare the rows, sweep the pairs once for the sums and once a side for the gradients; nothing
// of size N x M is stored, nothing is read back, every reduction has a fixed order.
//
//   infonce_rows       kernels that work once a row: operands, losses (infonce.3-4), weights
//   infonce_sums       sums over the negatives (infonce.2); infonce_online with a running maximum
//   infonce_products   gradient products (infonce.5-6); infonce_gradients finishes them
#include <tuple>

#include "infonce_gradients.cuh"
#include "infonce_problem.h"

namespace pix2rep::infonce {
namespace {

using Optional = OptionalTensor;

constexpr int64_t kBlocks = 264;  // two for each of the 132 multiprocessors of an H100 or H200; a constant, so that every device adds in one order

// Sums of one set of rows and the memory that they are in.
struct Found {
  Sums sums{};
  Tensor parts, lse2;
};

Found online_sums(const Problem& problem, const Rows& own, const Rows& stream, const LeftOut& left_out, bool ids, Found found) {
  found.lse2 = problem.floats({problem.groups, own.operand.padded});
  found.sums.lse2 = mutable_data<float>(found.lse2);
  launch_online(problem.launch, {own.operand, stream.operand, left_out, ids, problem.regime == Regime::shifted, found.sums});
  return found;
}

// Sums over `stream` of each row of `own`, and with `both` the other way round; "joint" has one set of rows.
std::vector<Found> sweep(const Problem& problem, const Rows& own, const Rows& stream, const LeftOut& left_out, bool ids, bool both) {
  const bool triangle = &own == &stream;
  if (problem.regime == Regime::online) {
    std::vector<Found> found{online_sums(problem, own, stream, left_out, ids, {})};
    if (both && !triangle) found.push_back(online_sums(problem, stream, own, left_out, ids, {}));
    return found;
  }
  const int64_t blocks = ceil_div(own.operand.count, kTile), tiles = ceil_div(stream.operand.count, kTile);
  // At most 32 x 32 parts keep their private sums small against the operands; enough of them for the device; else at least 8 tiles each, to pay
  // for the start of the pipeline. Of a triangle 64 give 2080 blocks, and 23 are the fewest that fill the device.
  int64_t own_parts = std::max<int64_t>(1, std::min<int64_t>(32, blocks));
  int64_t stream_parts = std::max<int64_t>(1, std::min({int64_t(32), tiles, std::max(ceil_div(kBlocks, own_parts * problem.groups), tiles / 8)}));
  if (triangle) own_parts = stream_parts = std::max<int64_t>(1, std::min({blocks, int64_t(64), std::max<int64_t>(23, blocks / 4)}));
  const int64_t part_blocks = std::max<int64_t>(1, ceil_div(blocks, own_parts)), part_tiles = std::max<int64_t>(1, ceil_div(tiles, stream_parts));
  own_parts = std::max<int64_t>(1, ceil_div(blocks, part_blocks)), stream_parts = std::max<int64_t>(1, ceil_div(tiles, part_tiles));

  std::vector<Found> found(both && !triangle ? 2 : 1);
  const auto allocate = [&](Found& sums, const Rows& rows, int64_t parts) {
    sums.parts = problem.floats({parts, problem.groups, rows.operand.padded});
    sums.sums = {mutable_data<float>(sums.parts), nullptr, parts, problem.too_small};
  };
  allocate(found[0], own, stream_parts);
  if (both && !triangle) allocate(found[1], stream, own_parts);
  const bool listed = ids || left_out.own_positive || left_out.stream_positive;
  const bool biased = own.masked || stream.masked || problem.regime == Regime::shifted;
  launch_sums(problem.launch,
              {own.operand, stream.operand, left_out, ids, triangle, found[0].sums.parts, both || triangle ? found.back().sums.parts : nullptr,
               int(own_parts), int(stream_parts), int(part_blocks), int(part_tiles), problem.temperature, problem.regime},
              biased, listed);
  if (problem.regime == Regime::shifted) {
    found[0] = online_sums(problem, own, stream, left_out, ids, found[0]);
    if (found.size() > 1) found[1] = online_sums(problem, stream, own, left_out, ids, found[1]);
  }
  return found;
}

// Of the anchors of each side.
std::vector<Found> negatives(const Problem& problem) {
  const Rows &x = problem.x, &y = problem.partners();
  const LeftOut left_out = problem.left_out(false);
  if (problem.negatives == Negatives::forward) return sweep(problem, x, y, left_out, problem.has_ids, false);
  std::vector<Found> found = sweep(problem, y, x, left_out, problem.has_ids, true);
  if (problem.joint()) return {found[0], found[0]};
  return {found[1], found[0]};
}

std::tuple<Tensor, Tensor> forward(Tensor a, Tensor b, Tensor temperature, double floor, std::string kind, Optional positive, Optional valid_a,
                                   Optional valid_b, Optional ids_a, Optional ids_b, Optional queue, std::optional<std::string> precision) {
  expect_precision(precision);
  const InfonceShape shape = checked(a, b, temperature, kind, positive, valid_a, valid_b, ids_a, ids_b, queue);
  const Problem problem(shape, a, b, temperature, floor, positive, valid_a, valid_b, ids_a, ids_b, queue, precision, false);
  Tensor out = problem.floats({problem.groups, problem.anchors()}), lse = problem.floats({problem.groups, problem.anchors()});
  if (problem.index) torch::stable::fill_(out, NAN), torch::stable::fill_(lse, NAN);  // rows of b that no index names
  if (problem.groups * problem.n == 0) return {out, lse};
  const std::vector<Found> found = negatives(problem);
  Found queued;
  if (problem.queue_count > 0) {
    queued = sweep(problem, problem.x, problem.queue, Problem::nothing(), false, false)[0];
    queued.sums.count = std::max<int64_t>(1, queued.sums.count);  // it is there, with or without parts
  }
  for (int side = 0; side < problem.sides(); ++side) {
    const View view = problem.view(side);
    problem.launch("infonce losses", &losses, ceil_div(problem.groups * view.count, kRowWarps), kRowThreads, 0, view, found[side].sums, queued.sums,
                   mutable_data<float>(out), mutable_data<float>(lse), problem.temperature, problem.regime);
  }
  return {out, lse};
}

// A product of all its rows with one set of candidates.
struct Multiplied {
  Parts parts{};
  Tensor memory;
};

Multiplied product(const Problem& problem, const Rows& own, const Rows& stream, const Weights& own_weights, const Weights& stream_weights,
                   const LeftOut& left_out, bool ids, const Extremes& extremes) {
  const int slice = product_slice(own.operand);
  const int64_t slices = ceil_div(own.operand.d, slice), tiles = ceil_div(stream.operand.count, kColumns);
  const int64_t blocks = std::max<int64_t>(1, ceil_div(own.operand.count, kTile) * problem.groups * slices);
  const int64_t part_tiles = std::max<int64_t>(1, ceil_div(tiles, std::max<int64_t>(1, std::min(tiles, ceil_div(kBlocks, blocks)))));
  const int64_t parts = std::max<int64_t>(1, ceil_div(tiles, part_tiles));
  // Rows that are no anchors weigh nothing.
  const Tensor nothing = torch::stable::new_zeros(problem.a, {problem.groups, std::max(own.operand.padded, stream.operand.padded)}, ScalarType::Float);
  Weights own_share = own_weights, stream_share = stream_weights;
  for (Weights* weights : {&own_share, &stream_share})
    if (!weights->share) weights->share = mutable_data<float>(nothing);
  Multiplied found;
  found.memory = problem.floats({parts, problem.groups, own.operand.padded, own.operand.d});
  found.parts = {data<float>(found.memory), int(parts)};
  const bool listed = ids || left_out.own_positive || left_out.stream_positive;
  launch_products(problem.launch,
                  {own.operand, stream.operand, own_share, stream_share, left_out, ids, mutable_data<float>(found.memory), extremes.smallest, int(parts),
                   int(part_tiles), int(slices), problem.temperature, problem.regime},
                  slice, listed);
  return found;
}

Weights weights_in(const Tensor& memory) {
  float* first = mutable_data<float>(memory);
  const int64_t size = memory.numel() / 4;
  return {first, first + size, first + 2 * size, first + 3 * size};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_losses, Tensor losses, Tensor lse, Tensor a, Tensor b, Tensor temperature, double floor,
                                            std::string kind, Optional positive, Optional valid_a, Optional valid_b, Optional ids_a, Optional ids_b,
                                            Optional queue, std::optional<std::string> precision, bool need_a, bool need_b, bool need_temperature) {
  expect_precision(precision);
  const InfonceShape shape = checked(a, b, temperature, kind, positive, valid_a, valid_b, ids_a, ids_b, queue);
  shape.expect_saved(grad_losses, losses, lse, ScalarType::Float);
  expect_home({{a, "a"}, {grad_losses, "grad_losses"}, {losses, "losses"}, {lse, "lse"}});
  const Problem problem(shape, a, b, temperature, floor, positive, valid_a, valid_b, ids_a, ids_b, queue, precision, true);
  losses = torch::stable::contiguous(losses), lse = torch::stable::contiguous(lse);
  const int64_t groups = problem.groups, anchors = problem.anchors();
  const bool needs[] = {need_a, need_b}, none = groups * problem.n == 0;
  Tensor grads[2];
  for (int side = 0; side < 2; ++side) {
    const Tensor& rows = side ? b : a;
    grads[side] = needs[side] ? torch::stable::new_empty(rows, {groups, rows.size(1), problem.d}) : torch::stable::new_empty(rows, {0});
    if (needs[side] && none) torch::stable::zero_(grads[side]);
    if (needs[side] && side && problem.index) torch::stable::fill_(grads[side], NAN);  // rows of b that no index names
  }
  Tensor grad_temperature = need_temperature ? torch::stable::new_empty(temperature, {}) : torch::stable::new_empty(temperature, {0});
  if (none && need_temperature) torch::stable::zero_(grad_temperature);
  if (none || !(need_a || need_b || need_temperature)) return {grads[0], grads[1], grad_temperature};

  const Tensor pieces = problem.floats({2, groups, kPieces});
  const Extremes extreme = {mutable_data<float>(pieces), mutable_data<float>(pieces) + groups * kPieces};
  const Upstream upstream = {grad_losses.data_ptr(), storage_of(grad_losses, "grad_losses"), grad_losses.stride(0), grad_losses.stride(1)};
  problem.launch("infonce extremes", &extremes, ceil_div(groups * kPieces, kRowWarps), kRowThreads, 0, upstream, data<float>(lse), groups, anchors, extreme);

  // "joint" has the weights of both sides in x's, "forward" none for b.
  Tensor memory[2];
  Weights weight[2] = {};
  for (int side = 0; side < problem.sides(); ++side) {
    const View view = problem.view(side);
    if (side && problem.joint()) {
      weight[1] = weight[0];
    } else {
      memory[side] = problem.floats({4, groups, view.own.padded});
      weight[side] = weights_in(memory[side]);
    }
    const int64_t written = problem.joint() && !side ? view.count : view.own.padded - view.offset;
    problem.launch("infonce weights", &weights, ceil_div(groups * ceil_div(written, 32), kRowWarps), kRowThreads, 0, view, upstream, data<float>(losses),
                   data<float>(lse), extreme, weight[side], problem.temperature, problem.regime, written);
  }

  Tensor dots[2];
  Multiplied main, queued;
  for (int side = 0; side < 2; ++side) {
    // <x, dx> over all rows counts each pair of "joint" twice, but its queue once; "cross" and "forward" have all of it in a.
    const bool measured = need_temperature && (side == 0 || problem.joint());
    if (!needs[side] && !measured) continue;
    const View view = problem.view(side);
    const Rows &own = side ? problem.partners() : problem.x, &stream = side ? problem.x : problem.partners();
    const Weights &own_weights = weight[side], &stream_weights = weight[1 - side];
    if (!(problem.joint() && main.parts.count)) {
      main = product(problem, own, stream, own_weights, stream_weights, problem.left_out(side), problem.has_ids, extreme);
      queued = {};
      if (problem.queue_count > 0 && own_weights.share) queued = product(problem, own, problem.queue, own_weights, {}, Problem::nothing(), false, extreme);
    }
    const Tensor unused = needs[side] ? grads[side] : torch::stable::new_empty(side ? b : a, {groups, view.count, problem.d});
    GradientsTask task{};
    task.view = view;
    task.listed = side && problem.positive;
    if (task.listed) task.view.positive = data<int64_t>(*problem.positive);
    task.rows = side ? problem.source(b, "b", problem.index) : problem.source(a, "a");
    task.partners = side ? problem.source(a, "a") : problem.source(b, "b", problem.index);
    task.own_weights = own_weights, task.partner_weights = stream_weights;
    task.negatives = main.parts, task.queue = queued.parts;
    task.largest = extreme.largest;
    task.halved = problem.joint() ? 0.5f : 1.0f;
    task.temperature = problem.temperature;
    task.grad = unused.data_ptr();
    const int64_t blocks = ceil_div(groups * view.count, kRowWarps);
    if (measured) dots[side] = problem.floats({blocks}), task.dots = mutable_data<float>(dots[side]);
    problem.launch("infonce gradients", &gradients, blocks, kRowThreads, kRowWarps * 4, task);
  }
  if (need_temperature) {
    const auto list = [&](int side) { return problem.joint() || !side ? data<float>(dots[side]) : nullptr; };
    problem.launch("infonce temperature", &temperature_gradient, 1, kRowThreads, kRowWarps * 4, list(0), dots[0].numel(), list(1),
                   problem.joint() ? dots[1].numel() : 0, problem.temperature, mutable_data<float>(grad_temperature));
  }
  return {grads[0], grads[1], grad_temperature};
}

}  // namespace
}  // namespace pix2rep::infonce

PIX2REP_CUDA_LIBRARY(m) {
  m.impl("infonce", TORCH_BOX(&pix2rep::infonce::forward));
  m.impl("infonce_backward", TORCH_BOX(&pix2rep::infonce::backward));
}
