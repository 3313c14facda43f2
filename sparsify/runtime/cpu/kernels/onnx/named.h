// What an operator is called and takes, and what is said where something is wrong.
#pragma once
#include "interface.h"

#include "../calls.h"

#include <cstdio>

namespace {

enum Layout { PAIRS = 0, MASK = 1, WHOLE = 2 };   // FewLayout of few.h
enum Input { X, INDEX, VALUES, CODES, SCALES, BIAS, INPUTS };

// One operator as onnxruntime is told of it: for each combination of types one.
struct Named : ort::Operator {
  const ort::Api* api;
  int layout, bits;    // bits: 8 or 4; 0: values of full width
  bool experts;        // a stack of matrices, and for each token which of them
  int given, stored;   // kinds: of x, bias and y; of the values, or of the scales of few bits

  bool has(int input) const {
    return input == INDEX ? experts : input == CODES ? layout != WHOLE : input == SCALES ? bits != 0 : input == BIAS ? !experts : true;
  }
  // Which input is given at place `at`; INPUTS: none. And the other way; -1: it has none.
  int input(size_t at) const {
    for (int i = 0; i < INPUTS; i++)
      if (has(i) && at-- == 0) return i;
    return INPUTS;
  }
  i64 place(int of) const {
    i64 at = 0;
    for (int i = 0; i < of; i++) at += has(i);
    return has(of) ? at : -1;
  }
  size_t count() const { return (size_t)(place(experts ? bits ? SCALES : layout == WHOLE ? VALUES : CODES : BIAS) + 1); }
};

int element_of(int kind) { return kind == F32 ? ort::FLOAT : kind == F16 ? ort::FLOAT16 : ort::BFLOAT16; }
const Named& named(const ort::Operator* op) { return *static_cast<const Named*>(op); }
const char* name_of(const ort::Operator* op) {
  static const char* const names[2][3][3] = {{{"Linear24", "LinearBitmask", nullptr},
                                              {"Linear24Int8", "LinearBitmaskInt8", "LinearInt8"},
                                              {"Linear24Int4", "LinearBitmaskInt4", "LinearInt4"}},
                                             {{"Experts24", "ExpertsBitmask", nullptr},
                                              {"Experts24Int8", "ExpertsBitmaskInt8", "ExpertsInt8"},
                                              {"Experts24Int4", "ExpertsBitmaskInt4", "ExpertsInt4"}}};
  const Named& n = named(op);
  return names[n.experts][n.bits == 8 ? 1 : n.bits == 4 ? 2 : 0][n.layout];
}

// ---- what may be wrong, said

struct Teller {   // `node` as the graph names it
  const ort::Api& api;
  const char *op, *node;

  template <class... A> OrtStatus* operator()(ort::Code code, const char* text, A... a) const {
    char what[300], all[600];
    snprintf(what, sizeof what, text, a...);
    snprintf(all, sizeof all, "sparsify.%s%s%s: %s", op, *node ? " " : "", node, what);
    return ort::status(api, code, all);
  }
};

struct Shape {
  size_t rank;
  i64 dims[8];
  int element;
  bool is(i64 count) const { return rank == 1 && dims[0] == count; }
  bool is(i64 rows, i64 columns) const { return rank == 2 && dims[0] == rows && dims[1] == columns; }
};

// The type and shape of a tensor; a rank above 8 has no dims.
OrtStatus* shape_of(const ort::Api& api, const OrtTensorTypeAndShapeInfo* info, Shape& out) {
  out = {};
  if (OrtStatus* bad = ort::GetTensorElementType(api, info, &out.element)) return bad;
  if (OrtStatus* bad = ort::GetDimensionsCount(api, info, &out.rank)) return bad;
  return out.rank <= 8 ? ort::GetDimensions(api, info, out.dims, out.rank) : nullptr;
}

OrtStatus* shape_of(const ort::Api& api, const OrtValue* value, Shape& out) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* bad = ort::GetTensorTypeAndShape(api, value, &info)) return bad;
  OrtStatus* bad = shape_of(api, info, out);
  ort::release(api, info);
  return bad;
}

}   // namespace
