// Memory for large outputs, kept from step to step.
//
// What an allocator gives back to the system comes again page by page, and a page fault for every 4 KiB of an output takes
// longer than to normalize it. Here a block that was freed waits for the next output of its size. What waits and what is in
// use are together at most half as much again as was in use at some time: then outputs of ever new sizes take little more
// memory than without waiting, and those of a network, of which not all sizes are at their most at once, find theirs.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "common/dlpack.h"

namespace {

constexpr size_t large_page = 1 << 21;

// Large pages for what is about to be written, so that fresh memory costs few faults. Whole ones inside alone are affected.
void expect_writes(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t first = ((uintptr_t)data + large_page - 1) & ~(large_page - 1), end = ((uintptr_t)data + bytes) & ~(large_page - 1);
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

class KeptMemory {
  struct Block {
    DLManagedTensorVersioned managed;
    int64_t shape[DLTensor::most_axes], strides[DLTensor::most_axes];
    size_t bytes;
    void* data;
  };
  std::mutex lock;
  std::vector<Block*> waiting;  // the longest unused first
  size_t bytes_waiting = 0, most_waiting = 0;
  size_t bytes_used = 0, most_used = 0;
  size_t blocks = 0;  // that exist; there is room for so many to wait, so that giving one back asks for no memory

  KeptMemory() {
#ifndef _WIN32  // a child must not find the lock taken by a thread that it does not have
    auto unlock = [] { get().lock.unlock(); };
    pthread_atfork([] { get().lock.lock(); }, unlock, unlock);
#endif
  }

  static std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes >= large_page ? large_page : 64); }
  void destroy(Block* block) {
    operator delete(block->data, alignment(block->bytes));
    delete block;
    blocks--;
  }
  Block* create(size_t bytes) {
    try {
      waiting.reserve(blocks + 1);
      auto block = std::make_unique<Block>();
      block->bytes = bytes;
      block->data = operator new(bytes, alignment(bytes));
      expect_writes(block->data, bytes);
      blocks++;
      return block.release();
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
  // The one that was freed last is the likeliest to be in the cache still.
  Block* find(size_t bytes) {
    for (size_t i = waiting.size(); i-- > 0;)
      if (waiting[i]->bytes == bytes) {
        Block* block = waiting[i];
        waiting.erase(waiting.begin() + i);
        bytes_waiting -= bytes;
        return block;
      }
    return nullptr;
  }
  void let_wait(size_t most) {
    size_t gone = 0;
    for (; bytes_waiting > most; gone++) {
      bytes_waiting -= waiting[gone]->bytes;
      destroy(waiting[gone]);
    }
    waiting.erase(waiting.begin(), waiting.begin() + gone);
  }
  static void give_back(DLManagedTensorVersioned* managed) {
    auto* block = (Block*)managed;
    KeptMemory& memory = get();
    std::lock_guard<std::mutex> guard(memory.lock);
    memory.waiting.push_back(block);
    memory.bytes_waiting += block->bytes;
    memory.bytes_used -= block->bytes;
    memory.let_wait(memory.most_waiting);
  }

 public:
  // Never destroyed: tensors may outlive whatever ends a process.
  static KeptMemory& get() {
    static auto* memory = new KeptMemory;
    return *memory;
  }
  // At most so many bytes wait from now on. Returns the setting before.
  size_t keep_at_most(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    const size_t before = most_waiting;
    most_waiting = bytes;
    let_wait(most_waiting);
    return before;
  }
  size_t waiting_now() {
    std::lock_guard<std::mutex> guard(lock);
    return bytes_waiting;
  }
  // Smaller ones an allocator keeps by itself, and larger ones would push out all others.
  bool serves(size_t bytes) const { return bytes >= 1 << 16 && bytes <= most_waiting; }
  // A tensor like another one, which has no gaps; null for want of memory. Its deleter gives the memory back.
  DLManagedTensorVersioned* take(const DLTensor& like, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    const size_t using_now = bytes_used + bytes, most = using_now > most_used ? using_now : most_used;
    Block* block = find(bytes);
    if (!block) {
      let_wait(most + most / 2 - using_now);
      block = create(bytes);
    }
    if (!block) {
      let_wait(0);
      block = create(bytes);
    }
    if (!block) return nullptr;
    bytes_used = using_now;
    most_used = most;
    memcpy(block->shape, like.shape, like.ndim * sizeof(int64_t));
    memcpy(block->strides, like.strides, like.ndim * sizeof(int64_t));
    block->managed = {{1, 0}, nullptr, give_back, 0, {block->data, {1, 0}, like.ndim, like.dtype, block->shape, block->strides, 0}};
    return &block->managed;
  }
};

}  // namespace
