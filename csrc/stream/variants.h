// One group of tensors merged by several rules: what they have in common is done once.
#pragma once
#include <algorithm>
#include <vector>

#include "merge.h"

namespace pm {

// The jobs of every variant, over the same tensors in the same order.
using Family = std::vector<std::vector<int64_t>>;

// Leaders are merged; those that follow differ from one in lambda alone, and are written along with it.
template <class Work>
class Variants {
 public:
  // The groups have the numbers from `number` on.
  Variants(RunContext& run, const Family& family, int64_t number) {
    groups_.reserve(family.size());
    for (size_t v = 0; v < family.size(); ++v) groups_.emplace_back(run, number + int64_t(v), family[v]);
    for (Group<Work>& group : groups_) {
      const auto leader = std::find_if(leaders_.begin(), leaders_.end(),
                                       [&](const Group<Work>* other) { return follows(group, *other); });
      if (leader == leaders_.end())
        leaders_.push_back(&group);
      else
        (*leader)->further.push_back(&group);
    }
  }
  Variants(const Variants&) = delete;

  Group<Work>& first() { return groups_[0]; }

  // Finds the cuts of leaders that trim alike together. One alone merges and searches in the same reading,
  // but for followers cuts must be final before anything is written.
  void search(Crew& crew) {
    std::vector<const Group<Work>*> left;
    std::copy_if(leaders_.begin(), leaders_.end(), std::back_inserter(left),
                 [](const Group<Work>* group) { return is_searched(*group); });
    while (!left.empty()) {
      const Group<Work>& first = *left[0];
      const auto others = std::stable_partition(
          left.begin(), left.end(), [&](const Group<Work>* group) { return trims_alike(*group, first); });
      const std::vector<const Group<Work>*> alike(left.begin(), others);
      left.erase(left.begin(), others);
      if (alike.size() == 1 && first.further.empty()) continue;
      const std::vector<std::vector<Cut>> cuts = search_cuts(alike, crew);
      for (size_t i = 0; i < alike.size(); ++i) alike[i]->run().cuts[size_t(alike[i]->number)] = cuts[i];
    }
  }

  // Merges those leaders together that need but one reading more, the others one by one: merge(leader).
  template <class F>
  void merge(Crew& crew, F&& merge_one) {
    std::vector<Group<Work>*> together, others;
    for (Group<Work>* group : leaders_)
      (is_plain(*group) && reads_alike(*group, *leaders_[0]) ? together : others).push_back(group);
    if (together.size() == 1) others.insert(others.begin(), together[0]);
    if (together.size() > 1) map_together(together, crew);
    for (Group<Work>* group : others) merge_one(*group);
  }

 private:
  static bool follows(const Group<Work>& group, const Group<Work>& leader) {
    Rule rule = group.rule();
    rule.lambda = leader.rule().lambda;
    const bool shared = rule.base && rule.fuse == Fuse::none && rule.blend.kind == Blend::none;
    return shared && rule == leader.rule() && group.views[0].job().key == leader.views[0].job().key &&
           reads_alike(group, leader);
  }
  // Whether a tile that one has loaded serves the other.
  static bool reads_alike(const Group<Work>& group, const Group<Work>& other) {
    if (group.rule().base != other.rule().base) return false;
    for (size_t t = 0; t < group.views.size(); ++t) {
      const TensorJob &a = group.views[t].job(), &b = other.views[t].job();
      if (a.has_cast != b.has_cast || a.cast != b.cast || a.out.dtype != b.out.dtype) return false;
    }
    return group.views[0].kernel_dtype() == other.views[0].kernel_dtype();
  }
  static bool is_plain(const Group<Work>& group) {
    const Rule& rule = group.rule();
    if (rule.blend.kind != Blend::none || rule.fuse != Fuse::none || by_mask(rule.trim) || rule.rescale)
      return false;
    return !by_magnitude(rule.trim) || !group.trims() || !group.run().cuts[size_t(group.number)].empty();
  }
  static bool is_searched(const Group<Work>& group) {
    return by_magnitude(group.rule().trim) && !group.rule().rescale &&
           (group.is_whole() || !group.is_small()) && group.searched() &&
           group.run().cuts[size_t(group.number)].empty();
  }
  static bool trims_alike(const Group<Work>& a, const Group<Work>& b) {
    return a.rule().trim == b.rule().trim && a.rule().all_ties == b.rule().all_ties;
  }

  std::vector<Group<Work>> groups_;
  std::vector<Group<Work>*> leaders_;
};

}  // namespace pm
