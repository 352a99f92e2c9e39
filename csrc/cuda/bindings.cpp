// sedetect._cuda. Device memory comes as addresses, the stream as its handle: the module needs neither torch nor a
// driver to be built or imported. Shapes and meanings are in stages.h, grouped_gemm.h and mixed_gemm.h;
// sedetect/ops/cuda.py is the caller.
#include "../columns.h"
#include "grouped_gemm.h"
#include "mixed_gemm.h"
#include "stages.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace sedetect::cuda {
namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

// (best, part, sqnorm, in_parts, y, h), (y_type, h_type, hidden, intermediate, y_part_width, h_part_width,
// in_parts_number)
using RowsArguments = std::tuple<std::array<Address, 6>, std::array<int, 7>>;

RowParts rows_of(const RowsArguments& rows) {
  const auto& [a, n] = rows;
  return {at<float>(a[0]),
          at<int32_t>(a[1]),
          at<float>(a[2]),
          at<float>(a[3]),
          at<void>(a[4]),
          at<void>(a[5]),
          Type(n[0]),
          Type(n[1]),
          n[2],
          n[3],
          n[4],
          n[5],
          n[6]};
}

// (row, tiles, count, arrived, rows, max_tiles)
using ScheduleArguments = std::tuple<Address, Address, Address, Address, int, int>;

Schedule schedule_of(const ScheduleArguments& schedule) {
  const auto [row, tiles, count, arrived, rows, max_tiles] = schedule;
  return {at<int32_t>(row), at<int4>(tiles), at<int32_t>(count), at<int32_t>(arrived), rows, max_tiles};
}

// (activation, gated, limit, slope, shift)
using GateArguments = std::tuple<int, bool, float, float, float>;

Gate gate_of(const GateArguments& gate) {
  const auto [activation, gated, limit, slope, shift] = gate;
  return {Activation(activation), gated, limit, slope, shift};
}

// (format, scale_rows, scale_columns, high, wide)
using QuantizedArguments = std::array<int, 5>;

Quantized quantized_of(Address stored, Address scale, const QuantizedArguments& n) {
  return {at<void>(stored), at<void>(scale), Format(n[0]), n[1], n[2], n[3], n[4]};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("COUNTS") = int(kCounts);
  m.attr("SUMS") = int(kSums);
  m.attr("COLUMNS") = int(kColumns);
  m.attr("TILE_ROWS") = kTileRows;
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("MAX_MIXED_EXPERTS") = kMaxMixedExperts;
  m.def("plan_blocks", &plan_blocks);
  m.def("update_scratch", &update_scratch);
  m.def("column_tiles", &column_tiles);
  m.def("mixed_column_tiles", &mixed_column_tiles);

  m.def("plan", [](Address index, bool narrow, Address order, Address offsets, const ScheduleArguments& result,
                   Address counts, int slots, int experts, int processors, Address stream) {
    plan({at<void>(index), narrow, at<int64_t>(order), at<int64_t>(offsets), schedule_of(result), at<int32_t>(counts),
          slots, experts, processors},
         stream_of(stream));
  });

  m.def("gate_up", [](Address x, Address weight, Address order, Address tiles, Address count, Address h, Address parts,
                      const GateArguments& gate, int type, int slots, int top_k, int experts, int hidden, int width,
                      int processors, Address stream) {
    grouped_gemm_gate_up(
        {at<void>(x), at<void>(weight), at<int64_t>(order), at<int4>(tiles), at<int32_t>(count), at<void>(h),
         at<float>(parts), gate_of(gate), Type(type), slots, top_k, experts, hidden, width, processors},
        stream_of(stream));
  });

  m.def("down", [](Address h, Address weight, Address tiles, Address count, Address y, int type, int slots, int experts,
                   int hidden, int width, int processors, Address stream) {
    grouped_gemm_down({at<void>(h), at<void>(weight), at<int4>(tiles), at<int32_t>(count), at<void>(y), Type(type),
                       slots, experts, hidden, width, processors},
                      stream_of(stream));
  });

  m.def("mixed", [](Address x, Address stored, Address scale, Address bias, Address offsets, Address next,
                    Address result, Address parts, const QuantizedArguments& quantized, const GateArguments& gate,
                    bool interleaved, int type, int form, int slots, int experts, int inner, int width,
                    int processors, Address stream) {
    mixed_gemm(
        {at<void>(x), quantized_of(stored, scale, quantized), at<void>(bias), at<int64_t>(offsets), at<int32_t>(next),
         at<void>(result), at<float>(parts), gate_of(gate), interleaved, Type(type), Form(form), slots, experts, inner,
         width, processors},
        stream_of(stream));
  });

  m.def("update",
        [](const RowsArguments& found, Address order, const ScheduleArguments& schedule, Address gates, int gates_type,
           const std::array<Address, 5>& rows, Address counts, Address sums, const std::array<Address, 3>& records,
           const std::array<int, 3>& kept, Address scratch, int slots, int top_k, int source, Address stream) {
          update({rows_of(found),
                  at<int64_t>(order),
                  schedule_of(schedule),
                  at<void>(gates),
                  Type(gates_type),
                  at<bool>(rows[0]),
                  at<bool>(rows[1]),
                  at<int64_t>(rows[2]),
                  at<int64_t>(rows[3]),
                  at<int64_t>(rows[4]),
                  at<int64_t>(counts),
                  at<double>(sums),
                  {at<int64_t>(records[0]), at<int64_t>(records[1]), at<int64_t>(records[2])},
                  {kept[0], kept[1], kept[2]},
                  at<void>(scratch),
                  slots,
                  top_k,
                  source},
                 stream_of(stream));
        });
}

}  // namespace sedetect::cuda
