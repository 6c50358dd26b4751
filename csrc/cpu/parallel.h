// Threads. Nothing else in the project owns any; kernels and algorithms are handed a crew to work with.
#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pm {

// Runs a body for every index, in increasing order per member. `member` is below size().
class Crew {
 public:
  using Body = std::function<void(int member, int64_t index)>;
  virtual ~Crew() = default;
  virtual int size() const = 0;
  virtual void each(int64_t count, const Body& body) = 0;
};

// One member of a larger team working on its own.
class Solo final : public Crew {
 public:
  explicit Solo(int member) : member_(member) {}
  int size() const override { return member_ + 1; }
  void each(int64_t count, const Body& body) override {
    for (int64_t i = 0; i < count; ++i) body(member_, i);
  }

 private:
  int member_;
};

// Persistent threads; the caller is member 0. The first exception stops the rest and is rethrown.
// Where the system refuses to start more threads, the team is as large as it got.
class Team final : public Crew {
 public:
  explicit Team(int size) {
    try {
      for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { serve(member); });
    } catch (const std::system_error&) {
    }
  }
  ~Team() override {
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int size() const override { return int(threads_.size()) + 1; }

  void each(int64_t count, const Body& body) override {
    {
      std::lock_guard lock(mutex_);
      body_ = &body;
      count_ = count;
      next_ = 0;
      busy_ = int(threads_.size());
      error_ = nullptr;
      ++generation_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return busy_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work(int member) {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*body_)(member, i);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }
  void serve(int member) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return closing_ || generation_ != seen; });
      if (closing_) return;
      seen = generation_;
      lock.unlock();
      work(member);
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  const Body* body_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  uint64_t generation_ = 0;
  int busy_ = 0;
  bool closing_ = false;
  std::exception_ptr error_;
};

}  // namespace pm
