// Memory for large outputs, kept from step to step.
//
// An allocator gives memory back to the system, which hands it out again page by page: a page fault for every 4 KiB, longer
// than it takes to normalize them. Blocks that were freed here wait for the next output of the same size instead.

#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "dlpack.h"

namespace {

class KeptMemory {
  struct Block {
    DLManagedTensor managed;
    int64_t shape[DLTensor::most_axes], strides[DLTensor::most_axes];
    size_t bytes;
    char* data;
  };
  // Never destroyed: outputs may outlive the interpreter.
  std::mutex& lock = *new std::mutex;
  std::vector<Block*>& waiting = *new std::vector<Block*>;
  size_t used = 0, highest = 0, kept = 0, most_kept = 0;

  static std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes >= large_page ? large_page : 64); }
  static void destroy(Block* block) {
    operator delete(block->data, alignment(block->bytes));
    delete block;
  }
  static Block* create(size_t bytes) {
    auto* block = new (std::nothrow) Block();
    if (!block) return nullptr;
    block->bytes = bytes;
    block->data = (char*)operator new(bytes, alignment(bytes), std::nothrow);
    if (!block->data) {
      delete block;
      return nullptr;
    }
#ifdef MADV_HUGEPAGE  // whole large pages inside alone are affected, and all of them are about to be written
    if (bytes >= large_page) madvise(block->data, bytes / large_page * large_page, MADV_HUGEPAGE);
#endif
    return block;
  }
  static void give_back(DLManagedTensor* managed) {
    auto* block = (Block*)managed;
    KeptMemory& memory = *(KeptMemory*)managed->context;
    std::lock_guard<std::mutex> guard(memory.lock);
    memory.used -= block->bytes;
    memory.kept += block->bytes;
    memory.waiting.push_back(block);
    memory.trim();
  }
  // The longest unused go first.
  void trim() {
    size_t gone = 0;
    for (; kept > most_kept; gone++) {
      kept -= waiting[gone]->bytes;
      destroy(waiting[gone]);
    }
    waiting.erase(waiting.begin(), waiting.begin() + gone);
  }
  // The one used last is the likeliest to be in the cache still.
  Block* find(size_t bytes) {
    for (size_t i = waiting.size(); i-- > 0;)
      if (waiting[i]->bytes == bytes) {
        Block* block = waiting[i];
        waiting.erase(waiting.begin() + i);
        kept -= bytes;
        return block;
      }
    return nullptr;
  }

 public:
  static constexpr size_t large_page = 1 << 21;
  static constexpr size_t from = 1 << 16;  // bytes: smaller ones the allocator keeps by itself

  struct Usage {
    size_t used, highest, kept;
  };
  void keep_at_most(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    most_kept = bytes;
    trim();
  }
  // What outputs hold, the most that they held since the last call, and what waits.
  Usage usage() {
    std::lock_guard<std::mutex> guard(lock);
    Usage now = {used, highest, kept};
    highest = used;
    return now;
  }
  bool serves(size_t bytes) { return bytes >= from && bytes <= most_kept; }
  // A tensor like another without gaps, or null for want of memory. Its deleter brings it back.
  DLManagedTensor* take(const DLTensor& like, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    Block* block = find(bytes);
    if (!block) block = create(bytes);
    if (!block) return nullptr;
    used += bytes;
    if (highest < used) highest = used;
    memcpy(block->shape, like.shape, like.ndim * sizeof(int64_t));
    memcpy(block->strides, like.strides, like.ndim * sizeof(int64_t));
    DLTensor tensor = {block->data, {1, 0}, like.ndim, like.dtype, block->shape, block->strides, 0};
    block->managed = {{1, 0}, this, give_back, 0, tensor};
    return &block->managed;
  }
};

}  // namespace
