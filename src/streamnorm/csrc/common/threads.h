// Loops over several threads: those of the OpenMP runtime that PyTorch runs on.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace {

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*GetThread)();
GompParallel gomp_parallel = nullptr;
GetThread thread_number = nullptr;  // omp_get_thread_num
std::atomic<bool> forked{false};    // GNU's runtime does not survive a fork: a child stays on one thread

// A function of a library that is loaded, or of one that it needs; without a library's name, of any. Null where there is none. It loads
// nothing.
template <class Function> void find_function(const char* library, const char* name, Function*& function) {
  void* found = nullptr;
#ifndef _WIN32
  void* handle = *library ? dlopen(library, RTLD_LAZY | RTLD_NOLOAD) : RTLD_DEFAULT;
  if (handle || !*library) found = dlsym(handle, name);
#endif
  memcpy(&function, &found, sizeof found);
}

// Whether there is a runtime: PyTorch's own where its library is known, else whichever one the process has; none is loaded.
bool find_threads(const char* library) {
  for (const char* place : {library, ""}) {
    find_function(place, "GOMP_parallel", gomp_parallel);
    find_function(place, "omp_get_thread_num", thread_number);
    if (gomp_parallel && thread_number) break;
  }
  if (!thread_number) gomp_parallel = nullptr;
#ifndef _WIN32
  static bool registered = false;
  if (!registered) pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  registered = true;
#endif
  return gomp_parallel != nullptr;
}

// Each thread has a share of neighbouring tasks, so that it finds in its cache what it had there in the pass before, and what
// it asked for ahead of time is its own. One that is done with its share helps with the others'.
struct Share {
  alignas(64) std::atomic<int64_t> next;
  int64_t end;
};
enum class Way { forth, back };  // back: from the last task to the first
struct Team {
  static constexpr int most_shares = 64;
  Share shares[most_shares];
  int count;
  int64_t tasks;
  Way way;
  void (*run)(const void*, int64_t);
  const void* body;
  std::atomic<bool> out_of_memory{false};
};
void work(void* data) {
  Team& team = *(Team*)data;
  const int own = thread_number() % team.count;
  try {
    for (int s = 0; s < team.count; s++) {
      Share& share = team.shares[(own + s) % team.count];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        team.run(team.body, team.way == Way::back ? team.tasks - 1 - i : i);
    }
  } catch (const std::bad_alloc&) {  // it must not leave through the runtime, which ends the process
    team.out_of_memory.store(true, std::memory_order_relaxed);
  }
}
void run_tasks(int64_t tasks, int64_t threads, Way way, void (*run)(const void*, int64_t), const void* body) {
  threads = threads < tasks ? threads : tasks;
  if (threads <= 1 || !gomp_parallel || forked.load(std::memory_order_relaxed)) {
    for (int64_t i = 0; i < tasks; i++) run(body, way == Way::back ? tasks - 1 - i : i);
    return;
  }
  Team team;
  team.count = (int)(threads < Team::most_shares ? threads : Team::most_shares);
  team.tasks = tasks;
  team.way = way;
  team.run = run;
  team.body = body;
  for (int s = 0; s < team.count; s++) {
    const int share = way == Way::back ? team.count - 1 - s : s;  // a thread keeps its tasks, whichever way they are taken
    team.shares[share].next.store(tasks * s / team.count, std::memory_order_relaxed);
    team.shares[share].end = tasks * (s + 1) / team.count;
  }
  gomp_parallel(work, &team, (unsigned)threads, 0);
  if (team.out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}
template <class Fn> void parallel(int64_t tasks, int64_t threads, Way way, const Fn& fn) {
  run_tasks(tasks, threads, way, [](const void* body, int64_t i) { (*(const Fn*)body)(i); }, &fn);
}
template <class Fn> void parallel(int64_t tasks, int64_t threads, const Fn& fn) { parallel(tasks, threads, Way::forth, fn); }

}  // namespace
