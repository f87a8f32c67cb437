// The only file that knows Python: it converts arguments and names the functions of ffmerge_fast._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "assignment/assignment.h"
#include "common/cpu.h"
#include "common/memory.h"
#include "correlation/correlation.h"
#include "projection/projection.h"
#include "shared_ffn/shared_ffn.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (ffmerge::Isa isa : ffmerge::usable_isas()) names.emplace_back(ffmerge::isa_name(isa));
  return names;
}

ffmerge::Isa usable_isa(const std::string& name) {
  for (ffmerge::Isa isa : ffmerge::usable_isas()) {
    if (name == ffmerge::isa_name(isa)) return isa;
  }
  throw std::invalid_argument("isa: got " + name + ", which this process cannot use");
}

// A number that Python gives for an enum whose last value is `last`.
template <class Enum>
Enum checked(int value, Enum last, const char* name) {
  if (value < 0 || value > static_cast<int>(last))
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value));
  return static_cast<Enum>(value);
}

ffmerge::Dtype dtype_of(int value) { return checked(value, ffmerge::Dtype::float16, "dtype"); }
ffmerge::Activation activation_of(int value) {
  return checked(value, ffmerge::Activation::quick_gelu, "activation");
}

// Addresses come as integers: tensor.data_ptr().
template <class T>
void assignment(uintptr_t scores, int64_t batch, int64_t d, int64_t batch_stride, int64_t row_stride, bool transposed,
                bool minimize, const std::string& isa_name, int threads, uintptr_t permutation, uintptr_t objective,
                uintptr_t gap) {
  const ffmerge::Isa isa = usable_isa(isa_name);
  if (d < 0 || d > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("d: got " + std::to_string(d));
  const ffmerge::AssignmentShape shape{batch, static_cast<int>(d), batch_stride, row_stride, transposed};
  py::gil_scoped_release release;
  ffmerge::assignment_solve(reinterpret_cast<const T*>(scores), shape, minimize, isa, threads,
                            reinterpret_cast<int64_t*>(permutation), reinterpret_cast<double*>(objective),
                            reinterpret_cast<double*>(gap));
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ffmerge::Features features(uintptr_t x, int dtype, int64_t tokens, int64_t width, int64_t stride, int activation,
                           uintptr_t pivot, uintptr_t sum, uintptr_t sumsq) {
  return {pointer<const void>(x),      dtype_of(dtype),      tokens,
          width,                       stride,               activation_of(activation),
          pointer<const float>(pivot), pointer<double>(sum), pointer<double>(sumsq)};
}

// (width, left, right, split)
using Form = std::tuple<int64_t, bool, bool, bool>;

ffmerge::TileForm tile_form(const Form& form) {
  return {std::get<0>(form), std::get<1>(form), std::get<2>(form), std::get<3>(form)};
}

void multiply_tiles(const std::vector<std::tuple<Form, int64_t, std::vector<uintptr_t>>>& layers,
                    const std::vector<std::tuple<uintptr_t, int, int>>& products, bool emulated, int threads) {
  std::vector<std::vector<const char*>> chunks;
  std::vector<ffmerge::TileLayer> tiled;
  chunks.reserve(layers.size());
  for (const auto& [form, tokens, addresses] : layers) {
    chunks.emplace_back();
    for (uintptr_t address : addresses) chunks.back().push_back(pointer<const char>(address));
    tiled.push_back({tile_form(form), tokens, chunks.back().data()});
  }
  std::vector<ffmerge::TileProduct> sums;
  for (const auto& [accumulator, a, b] : products) {
    const int count = static_cast<int>(tiled.size());
    if (a < 0 || a >= count || b < 0 || b >= count) throw std::invalid_argument("products: a layer that is not given");
    sums.push_back({pointer<float>(accumulator), a, b});
  }
  ffmerge::correlation_multiply_tiles(tiled, sums, emulated, threads);
}

// (data, bias, outputs, inputs, stride, transposed); a missing gate has the data 0
using Weight = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, bool>;

ffmerge::FFNWeight ffn_weight(const Weight& weight) {
  const auto& [data, bias, outputs, inputs, stride, transposed] = weight;
  return {pointer<const void>(data), pointer<const void>(bias), outputs, inputs, stride, transposed};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() = "C++ side of ffmerge_fast: raw pointers and sizes, no torch. Signatures: _C.pyi.";
  m.def("cpu_isa", [] { return ffmerge::isa_name(ffmerge::best_isa()); },
        "The best instruction set this process can use.");
  m.def("cpu_isas", &cpu_isas, "Every instruction set this process can use, lowest first.");
  m.def("prefer_huge_pages",
        [](uintptr_t start, int64_t bytes) { ffmerge::prefer_huge_pages(pointer<void>(start), bytes); });
  m.def("assignment_f32", &assignment<float>, "scores"_a, "batch"_a, "d"_a, "batch_stride"_a, "row_stride"_a,
        "transposed"_a, "minimize"_a, "isa"_a, "threads"_a, "permutation"_a, "objective"_a, "gap"_a,
        "Exact assignment of float32 matrices.");
  m.def("assignment_f64", &assignment<double>, "scores"_a, "batch"_a, "d"_a, "batch_stride"_a, "row_stride"_a,
        "transposed"_a, "minimize"_a, "isa"_a, "threads"_a, "permutation"_a, "objective"_a, "gap"_a,
        "Exact assignment of float64 matrices.");

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "correlation_pack_rows",
      [](uintptr_t x, int dtype, int64_t tokens, int64_t width, int64_t stride, int activation, uintptr_t pivot,
         uintptr_t sum, uintptr_t sumsq, bool rounded, uintptr_t out, const std::string& isa,
         int threads) {
        ffmerge::correlation_pack_rows(features(x, dtype, tokens, width, stride, activation, pivot, sum, sumsq),
                                       rounded, pointer<float>(out), usable_isa(isa), threads);
      },
      no_gil);
  m.def(
      "correlation_pack_tiles",
      [](uintptr_t x, int dtype, int64_t tokens, int64_t width, int64_t stride, int activation, uintptr_t pivot,
         uintptr_t sum, uintptr_t sumsq, const Form& form, int64_t filled, const std::vector<uintptr_t>& addresses,
         const std::string& isa, int threads) {
        std::vector<char*> chunks;
        for (uintptr_t address : addresses) chunks.push_back(pointer<char>(address));
        ffmerge::correlation_pack_tiles(features(x, dtype, tokens, width, stride, activation, pivot, sum, sumsq),
                                        tile_form(form), filled, chunks.data(), usable_isa(isa), threads);
      },
      no_gil);
  m.def(
      "correlation_accumulate_ring",
      [](uintptr_t x, int dtype, int64_t tokens, int64_t width, int64_t stride, int activation, uintptr_t pivot,
         uintptr_t sum, uintptr_t sumsq, uintptr_t rows, int64_t count, int64_t first, uintptr_t signs, uintptr_t at,
         const std::string& isa, int threads) {
        if (count < 4 || first < 0 || first >= count)
          throw std::invalid_argument("ring: got row " + std::to_string(first) + " of " + std::to_string(count));
        const ffmerge::Ring ring{pointer<float>(rows), count, first, pointer<const float>(signs),
                                 pointer<const int64_t>(at)};
        ffmerge::correlation_accumulate_ring(
            features(x, dtype, tokens, width, stride, activation, pivot, sum, sumsq), ring, usable_isa(isa), threads);
      },
      no_gil);
  m.def("correlation_chunk_bytes", [](const Form& form) { return ffmerge::correlation_chunk_bytes(tile_form(form)); });
  m.def("correlation_accumulator_bytes", &ffmerge::correlation_accumulator_bytes);
  m.def("correlation_multiply_tiles", &multiply_tiles, no_gil);
  m.def(
      "correlation_untile",
      [](uintptr_t accumulator, int64_t width_a, int64_t width_b, bool symmetric, uintptr_t matrix, int threads) {
        ffmerge::correlation_untile(pointer<const float>(accumulator), width_a, width_b, symmetric,
                                    pointer<float>(matrix), threads);
      },
      no_gil);
  m.def(
      "correlation_tile",
      [](uintptr_t matrix, int64_t width_a, int64_t width_b, uintptr_t accumulator, int threads) {
        ffmerge::correlation_tile(pointer<const float>(matrix), width_a, width_b, pointer<float>(accumulator),
                                  threads);
      },
      no_gil);

  using Pair = std::tuple<int64_t, int64_t>;
  const auto strides = [](const Pair& pair) { return ffmerge::Strides{std::get<0>(pair), std::get<1>(pair)}; };
  m.def(
      "projection_select_f32",
      [=](const Pair& shape, const Pair& x_shape, uintptr_t x, const Pair& x_strides, uintptr_t rows, uintptr_t columns, uintptr_t residual,
          const Pair& residual_strides, uintptr_t out, int64_t out_stride, int threads) {
        ffmerge::projection_select_f32(
            {std::get<0>(shape), std::get<1>(shape), std::get<0>(x_shape), std::get<1>(x_shape),
             pointer<const float>(x), strides(x_strides),
             pointer<const int64_t>(rows), pointer<const int64_t>(columns), pointer<const float>(residual),
             strides(residual_strides), pointer<float>(out), out_stride},
            threads);
      },
      no_gil);
  m.def(
      "projection_scatter_f32",
      [=](const Pair& shape, const Pair& out_shape, uintptr_t y, const Pair& y_strides, uintptr_t rows,
          uintptr_t columns, uintptr_t out, int64_t out_stride, int threads) {
        ffmerge::projection_scatter_f32(
            {std::get<0>(shape), std::get<1>(shape), std::get<0>(out_shape), std::get<1>(out_shape),
             pointer<const float>(y), strides(y_strides),
             pointer<const int64_t>(rows), pointer<const int64_t>(columns), pointer<float>(out), out_stride},
            threads);
      },
      no_gil);
  m.def(
      "shared_ffn_decode",
      [](const Weight& up, const Weight& gate, const Weight& down, int dtype, int activation, uintptr_t x,
         int64_t tokens, int64_t x_stride, uintptr_t y, const std::string& isa, int tiles, int threads) {
        const ffmerge::FFN ffn{ffn_weight(up), ffn_weight(gate), ffn_weight(down), dtype_of(dtype),
                               activation_of(activation)};
        for (const ffmerge::FFNWeight& weight : {ffn.up, ffn.down}) {
          if (weight.outputs < 1 || weight.inputs < 1) throw std::invalid_argument("shared_ffn_decode: empty weight");
        }
        ffmerge::shared_ffn_decode(ffn, pointer<const void>(x), tokens, x_stride, pointer<void>(y), usable_isa(isa),
                                   checked(tiles, ffmerge::Tiles::emulated, "tiles"), threads);
      },
      no_gil);
  m.def(
      "shared_ffn_activate",
      [](int activation, int dtype, uintptr_t up, uintptr_t gate, uintptr_t hidden, int64_t count,
         const std::string& isa, int threads) {
        ffmerge::shared_ffn_activate(activation_of(activation), dtype_of(dtype),
                                     pointer<const void>(up), pointer<const void>(gate), pointer<void>(hidden), count,
                                     usable_isa(isa), threads);
      },
      no_gil);
  m.def(
      "shared_ffn_activate_backward",
      [](int activation, int dtype, uintptr_t d_hidden, uintptr_t up, uintptr_t gate, uintptr_t d_up, uintptr_t d_gate,
         uintptr_t hidden, int64_t count, const std::string& isa, int threads) {
        ffmerge::shared_ffn_activate_backward(
            activation_of(activation), dtype_of(dtype), pointer<const void>(d_hidden), pointer<const void>(up), pointer<const void>(gate), pointer<void>(d_up),
            pointer<void>(d_gate), pointer<void>(hidden), count, usable_isa(isa), threads);
      },
      no_gil);
}
