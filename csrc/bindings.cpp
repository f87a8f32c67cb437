// The only file that knows Python: it converts arguments and names the functions of ffmerge_fast._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "assignment.h"
#include "common/cpu.h"

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

// Addresses come as integers: tensor.data_ptr().
template <class T>
void assignment(uintptr_t scores, int64_t batch, int64_t d, int64_t batch_stride, int64_t row_stride, bool transposed,
                bool minimize, const std::string& isa_name, int threads, uintptr_t permutation, uintptr_t objective,
                uintptr_t gap) {
  const ffmerge::Isa isa = usable_isa(isa_name);
  const ffmerge::AssignmentShape shape{batch, static_cast<int>(d), batch_stride, row_stride, transposed};
  py::gil_scoped_release release;
  ffmerge::assignment_solve(reinterpret_cast<const T*>(scores), shape, minimize, isa, threads,
                            reinterpret_cast<int64_t*>(permutation), reinterpret_cast<double*>(objective),
                            reinterpret_cast<double*>(gap));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() = "C++ side of ffmerge_fast: raw pointers and sizes, no torch. Signatures: _C.pyi.";
  m.def("cpu_isa", [] { return ffmerge::isa_name(ffmerge::best_isa()); },
        "The best instruction set this process can use.");
  m.def("cpu_isas", &cpu_isas, "Every instruction set this process can use, lowest first.");
  m.def("assignment_f32", &assignment<float>, "scores"_a, "batch"_a, "d"_a, "batch_stride"_a, "row_stride"_a,
        "transposed"_a, "minimize"_a, "isa"_a, "threads"_a, "permutation"_a, "objective"_a, "gap"_a,
        "Exact assignment of float32 matrices.");
  m.def("assignment_f64", &assignment<double>, "scores"_a, "batch"_a, "d"_a, "batch_stride"_a, "row_stride"_a,
        "transposed"_a, "minimize"_a, "isa"_a, "threads"_a, "permutation"_a, "objective"_a, "gap"_a,
        "Exact assignment of float64 matrices.");
}
