#include <torch/extension.h>

#include "columns.h"
#include "cpu.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("COUNTS") = int(sedetect::kCounts);
  m.attr("SUMS") = int(sedetect::kSums);
  m.attr("COLUMNS") = int(sedetect::kColumns);
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("plan_cpu", &sedetect::plan_cpu, release());
  m.def("experts_cpu", &sedetect::experts_cpu, release());
  m.def("gate_up_cpu", &sedetect::gate_up_cpu, release());
  m.def("down_cpu", &sedetect::down_cpu, release());
  m.def("row_stats_cpu", &sedetect::row_stats_cpu, release());
  m.def("update_cpu", &sedetect::update_cpu, release());
}
