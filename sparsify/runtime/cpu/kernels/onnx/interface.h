// The part of onnxruntime's C interface that is used here. Its wheels bring no header, and its table of functions only ever
// grows at the end: a function is a place in the table, which GetApi(VERSION) says is there. tests/runtime/test_onnx_operators.py
// holds every place and every signature against onnxruntime's own header where there is one.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtOpAttr;

namespace ort {

const uint32_t VERSION = 17;   // the first with KernelContext_ParallelFor and with shapes of custom operators

// What onnxruntime's enumerations call these.
enum Code { FAIL = 1, INVALID_ARGUMENT = 2, NOT_IMPLEMENTED = 9, INVALID_GRAPH = 10 };
enum Element { FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum Presence { REQUIRED = 0, OPTIONAL = 1 };
const int INT_ATTRIBUTE = 1;

struct Operator;
struct Api { void* places[275]; };

// name, place, what follows `OrtStatus*`
#define SPARSIFY_ORT_FUNCTIONS(F)                                                                                    \
  F(GetTensorMutableData, 51, (OrtValue*, void**))                                                                   \
  F(CreateTensorTypeAndShapeInfo, 57, (OrtTensorTypeAndShapeInfo**))                                                 \
  F(SetTensorElementType, 58, (OrtTensorTypeAndShapeInfo*, int))                                                     \
  F(SetDimensions, 59, (OrtTensorTypeAndShapeInfo*, const int64_t*, size_t))                                         \
  F(GetTensorElementType, 60, (const OrtTensorTypeAndShapeInfo*, int*))                                              \
  F(GetDimensionsCount, 61, (const OrtTensorTypeAndShapeInfo*, size_t*))                                             \
  F(GetDimensions, 62, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))                                         \
  F(GetSymbolicDimensions, 63, (const OrtTensorTypeAndShapeInfo*, const char**, size_t))                             \
  F(GetTensorTypeAndShape, 65, (const OrtValue*, OrtTensorTypeAndShapeInfo**))                                       \
  F(KernelInfoGetAttribute_int64, 86, (const OrtKernelInfo*, const char*, int64_t*))                                 \
  F(KernelContext_GetInputCount, 88, (const OrtKernelContext*, size_t*))                                             \
  F(KernelContext_GetInput, 90, (const OrtKernelContext*, size_t, const OrtValue**))                                 \
  F(KernelContext_GetOutput, 91, (OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**))                    \
  F(KernelInfo_GetNodeName, 244, (const OrtKernelInfo*, char*, size_t*))                                             \
  F(KernelInfoGetConstantInput_tensor, 249, (const OrtKernelInfo*, size_t, int*, const OrtValue**))                  \
  F(ShapeInferContext_GetInputTypeShape, 268, (const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**))    \
  F(ShapeInferContext_GetAttribute, 269, (const OrtShapeInferContext*, const char*, const OrtOpAttr**))              \
  F(ShapeInferContext_SetOutputTypeShape, 270, (const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*)) \
  F(SetSymbolicDimensions, 271, (OrtTensorTypeAndShapeInfo*, const char**, size_t))                                  \
  F(ReadOpAttr, 272, (const OrtOpAttr*, int, void*, size_t, size_t*))                                                \
  F(KernelContext_ParallelFor, 274, (const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*))       \
  F(CreateCustomOpDomain, 26, (const char*, OrtCustomOpDomain**))                                                    \
  F(CustomOpDomain_Add, 27, (OrtCustomOpDomain*, const Operator*))                                                   \
  F(AddCustomOpDomain, 28, (OrtSessionOptions*, OrtCustomOpDomain*))

#define SPARSIFY_ORT_CALL(name, place, arguments)                       \
  typedef OrtStatus*(*name##_type) arguments;                           \
  const int name##_place = place;                                       \
  template <class... A> OrtStatus* name(const Api& api, A... given) {   \
    return ((name##_type)api.places[place])(given...);                  \
  }
SPARSIFY_ORT_FUNCTIONS(SPARSIFY_ORT_CALL)
#undef SPARSIFY_ORT_CALL

// These two are of other kinds.
typedef OrtStatus*(*CreateStatus_type)(int, const char*);
typedef void (*ReleaseTensorTypeAndShapeInfo_type)(OrtTensorTypeAndShapeInfo*);
typedef void (*ReleaseStatus_type)(OrtStatus*);
const int CreateStatus_place = 0, ReleaseTensorTypeAndShapeInfo_place = 99, ReleaseStatus_place = 93;

inline OrtStatus* status(const Api& api, Code code, const char* text) {
  return ((CreateStatus_type)api.places[CreateStatus_place])(code, text);
}
inline void release(const Api& api, OrtTensorTypeAndShapeInfo* info) {
  ((ReleaseTensorTypeAndShapeInfo_type)api.places[ReleaseTensorTypeAndShapeInfo_place])(info);
}
inline void release(const Api& api, OrtStatus* status) { ((ReleaseStatus_type)api.places[ReleaseStatus_place])(status); }

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// OrtCustomOp as of VERSION, which its first field says: what later ones added is not read then.
struct Operator {
  uint32_t version;
  void* (*CreateKernel)(const Operator*, const Api*, const OrtKernelInfo*);
  const char* (*GetName)(const Operator*);
  const char* (*GetExecutionProviderType)(const Operator*);
  int (*GetInputType)(const Operator*, size_t);
  size_t (*GetInputTypeCount)(const Operator*);
  int (*GetOutputType)(const Operator*, size_t);
  size_t (*GetOutputTypeCount)(const Operator*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const Operator*, size_t);
  int (*GetOutputCharacteristic)(const Operator*, size_t);
  int (*GetInputMemoryType)(const Operator*, size_t);
  int (*GetVariadicInputMinArity)(const Operator*);
  int (*GetVariadicInputHomogeneity)(const Operator*);
  int (*GetVariadicOutputMinArity)(const Operator*);
  int (*GetVariadicOutputHomogeneity)(const Operator*);
  OrtStatus* (*CreateKernelV2)(const Operator*, const Api*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const Operator*, OrtShapeInferContext*);
  int (*GetStartVersion)(const Operator*);
  int (*GetEndVersion)(const Operator*);
};

}   // namespace ort
