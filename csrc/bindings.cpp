// The only file that knows Python: it converts arguments and names the functions of ffmerge_fast._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (ffmerge::Isa isa : ffmerge::usable_isas()) names.emplace_back(ffmerge::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ side of ffmerge_fast: raw pointers and sizes, no torch. Signatures: _C.pyi.";
  m.def("cpu_isa", [] { return ffmerge::isa_name(ffmerge::best_isa()); },
        "The best instruction set this process can use.");
  m.def("cpu_isas", &cpu_isas, "Every instruction set this process can use, lowest first.");
}
