// A pool of threads that sleep unless calls come densely. Not OpenMP: torch brings its own libgomp, a second runtime
// beside it spins on the same cores, and neither survives fork(). Here a worker looks for work for a moment, then
// sleeps; a forked child starts with an empty pool.
//
// A job is open while its caller works on it. Workers that wake in time join it; late ones find it closed and sleep
// again, so the caller waits for nobody who has not begun.
#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace ppomax {
namespace {

constexpr int MAX_WORKERS = 255;
constexpr uint32_t CLOSED = 1u << 31;

// How long a thread looks for work before it sleeps. The calls of a decoding loop come some 100 us apart, and waking a
// sleeper costs as much as such a call (in a virtual machine more); on a busy machine so short a look takes nobody's
// core for long.
constexpr std::chrono::microseconds LOOK(200);

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One waiter at a time.
class Semaphore {
public:
    void post() {
        count_.fetch_add(1);
        if (asleep_.load()) {
            std::lock_guard<std::mutex> guard(mutex_);  // the waiter holds it from its last look until it sleeps
            changed_.notify_one();
        }
    }
    void wait() {
        const auto end = std::chrono::steady_clock::now() + LOOK;
        do {
            for (int i = 0; i < 32; ++i) {
                if (take()) return;
                pause_briefly();
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> guard(mutex_);
        asleep_.store(true);
        changed_.wait(guard, [this] { return take(); });
        asleep_.store(false);
    }

private:
    bool take() {
        int64_t count = count_.load();
        while (count > 0)
            if (count_.compare_exchange_weak(count, count - 1)) return true;
        return false;
    }

    std::atomic<int64_t> count_{0};
    std::atomic<bool> asleep_{false};
    std::mutex mutex_;
    std::condition_variable changed_;
};

class Pool {
public:
    std::mutex callers;  // held by the one caller that the pool serves

    void run(int threads, int64_t items, int64_t chunk, void (*body)(void *, int64_t, int64_t), void *context) {
        const int wanted = grow(threads - 1);
        body_ = body;
        context_ = context;
        items_ = items;
        chunk_ = chunk;
        next_.store(0, std::memory_order_relaxed);
        state_.store(0, std::memory_order_release);
        for (int i = 0; i < wanted; ++i) go_[i].post();
        work();
        // The count of workers inside; whoever leaves a closed job last wakes the caller.
        if (state_.fetch_or(CLOSED, std::memory_order_acq_rel) != 0) done_.wait();
    }

private:
    int grow(int wanted) {
        if (wanted > MAX_WORKERS) wanted = MAX_WORKERS;
        if (workers_ >= wanted) return wanted;
        sigset_t every, before;  // signals belong to the program's own threads
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        try {
            for (; workers_ < wanted; ++workers_) std::thread(&Pool::serve, this, &go_[workers_]).detach();
        } catch (const std::system_error &) {
            // No more threads to be had: fewer do the same work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return workers_;
    }

    void serve(Semaphore *go) {
        for (;;) {
            go->wait();
            uint32_t state = state_.load(std::memory_order_acquire);
            while (!(state & CLOSED) && !state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {}
            if (state & CLOSED) continue;
            work();
            if (state_.fetch_sub(1, std::memory_order_acq_rel) - 1 == CLOSED) done_.post();
        }
    }

    void work() {
        for (;;) {
            const int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
            if (begin >= items_) return;
            body_(context_, begin, begin + chunk_ < items_ ? begin + chunk_ : items_);
        }
    }

    Semaphore go_[MAX_WORKERS], done_;
    int workers_ = 0;
    void (*body_)(void *, int64_t, int64_t) = nullptr;
    void *context_ = nullptr;
    int64_t items_ = 0, chunk_ = 1;
    std::atomic<int64_t> next_{0};
    std::atomic<uint32_t> state_{CLOSED};
};

// Never destroyed: workers may outlive static destructors. A child of fork() has none of its parent's workers: it gets
// a new pool.
Pool *pool = nullptr;

void new_pool() { pool = new Pool; }

Pool &the_pool() {
    static const bool made = [] {
        new_pool();
        pthread_atfork([] { pool->callers.lock(); }, [] { pool->callers.unlock(); }, new_pool);
        return true;
    }();
    (void)made;
    return *pool;
}

}  // namespace

void parallel_chunks(int threads, int64_t items, int64_t chunk, void (*body)(void *, int64_t, int64_t), void *context) {
    const int64_t chunks = (items + chunk - 1) / chunk;
    if (items <= 0) return;
    if (threads > chunks) threads = (int)chunks;
    if (threads > 1) {
        Pool &shared = the_pool();
        std::unique_lock<std::mutex> mine(shared.callers, std::try_to_lock);
        if (mine.owns_lock()) {
            shared.run(threads, items, chunk, body, context);
            return;
        }
    }
    for (int64_t begin = 0; begin < items; begin += chunk)
        body(context, begin, begin + chunk < items ? begin + chunk : items);
}

}  // namespace ppomax
