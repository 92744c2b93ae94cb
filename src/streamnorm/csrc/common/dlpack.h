// DLPack 1.x, the part that is used (https://github.com/dmlc/dlpack, dlpack.h).

#pragma once

#include <cstdint>

struct DLTensor {
  static constexpr int most_axes = 16;  // of those that come here

  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
  struct { uint32_t major, minor; } version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor tensor;
};
struct DLPackExchangeAPI {
  struct { struct { uint32_t major, minor; } version; void* previous; } header;
  void *allocate, *from_object;
  int (*to_object)(DLManagedTensorVersioned* tensor, void** object);
  int (*borrow)(void* object, DLTensor* out);
  void* stream;
};
