#include "binding.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "engine.h"

namespace py = pybind11;

namespace pm {

namespace {

using CutList = std::vector<std::vector<std::pair<uint64_t, uint64_t>>>;

Rule make_rule(const py::dict& d) {
  Rule rule;
  rule.base = d["task_vector"].cast<bool>();
  rule.trim = Trim(d["trim"].cast<int>());
  rule.elect = d["elect"].cast<bool>();
  rule.normalize = d["normalize"].cast<bool>();
  rule.rescale = d["rescale"].cast<bool>();
  rule.all_ties = d["all_ties"].cast<bool>();
  rule.lambda = d["lambda"].cast<double>();
  rule.weight = d["weights"].cast<std::vector<double>>();
  rule.late = d["late_weights"].cast<std::vector<double>>();
  rule.density = d["densities"].cast<std::vector<double>>();
  rule.one_more = d["one_more"].cast<bool>();
  rule.gamma = d["gammas"].cast<std::vector<double>>();
  rule.epsilon = d["epsilons"].cast<std::vector<double>>();
  rule.fuse = Fuse(d["fuse"].cast<int>());
  rule.t = d["fuse_t"].cast<double>();
  rule.boost = d["boost"].cast<double>();
  rule.most_boost = d["most_boost"].cast<double>();
  rule.votes = d["votes"].cast<int>();
  rule.blend.kind = Blend(d["blend"].cast<int>());
  rule.blend.vectors = Vectors(d["vectors"].cast<int>());
  rule.blend.t = d["t"].cast<double>();
  rule.blend.eps = d["eps"].cast<double>();
  rule.blend.tol = d["tol"].cast<double>();
  rule.blend.max_iter = d["max_iter"].cast<int>();
  return rule;
}

// Numbers in rows of `width`, in any object with a buffer (array.array, say); not py::array, which imports
// numpy.
template <class T, size_t width>
class Table {
 public:
  explicit Table(const py::buffer& buffer) : info_(buffer.request()) {
    if (!info_.item_type_is_equivalent_to<T>() || info_.ndim != 1 || info_.strides[0] != sizeof(T) ||
        info_.shape[0] % width != 0)
      throw std::invalid_argument("expected one contiguous array of whole rows of 64-bit numbers");
  }
  size_t rows() const { return size_t(info_.shape[0]) / width; }
  const T* row(size_t number) const { return static_cast<const T*>(info_.ptr) + number * width; }

 private:
  py::buffer_info info_;
};

// Regions come as rows of (start, file, item bytes, dtype code), one row per input of each job in turn.
Region make_region(const int64_t* row) {
  return {row[0], int32_t(row[1]), int32_t(row[2]), DType(row[3] < 0 ? int(DType::f32) : int(row[3]))};
}

std::vector<Region> make_regions(const py::handle& rows) {
  const Table<int64_t, 4> table(py::reinterpret_borrow<py::buffer>(rows));
  std::vector<Region> regions;
  for (size_t i = 0; i < table.rows(); ++i) regions.push_back(make_region(table.row(i)));
  return regions;
}

// runs: rows of (first row, terms); terms: rows of (source, its row).
Rows make_rows(const py::dict& d) {
  Rows rows;
  rows.source = make_regions(d["sources"]);
  rows.averaged = d["averaged"].cast<int64_t>();
  const Table<int64_t, 2> runs(d["runs"].cast<py::buffer>()), terms(d["terms"].cast<py::buffer>());
  int64_t next = 0;
  for (size_t i = 0; i < runs.rows(); ++i) {
    const int64_t* run = runs.row(i);
    rows.run.push_back({run[0], run[1], next});
    next += std::max<int64_t>(run[1], 0);
  }
  for (size_t i = 0; i < terms.rows(); ++i) rows.term.push_back({terms.row(i)[0], terms.row(i)[1]});
  return rows;
}

// sources: the rows of base, left and right.
Product make_product(const py::dict& d) {
  const std::vector<Region> regions = make_regions(d["sources"]);
  return {regions.at(0),
          regions.at(1),
          regions.at(2),
          d["rows"].cast<int64_t>(),
          d["rank"].cast<int64_t>(),
          d["scale"].cast<double>(),
          d["transposed"].cast<bool>()};
}

Compound make_compound(const py::dict& d) {
  Compound compound;
  compound.width = d["width"].cast<int64_t>();
  if (d.contains("runs"))
    compound.made = make_rows(d);
  else
    compound.made = make_product(d);
  return compound;
}

// One run over a list of jobs. `execute` blocks without the interpreter lock; the others may be called
// meanwhile.
class Run {
 public:
  // jobs: rows of (count, rule or -1, cast code or -1, inputs, row), for each variant in turn; inputs: those
  // of the first variant, which serve all; outs: one region row per job; given: thresholds per group, or
  // nothing.
  Run(const py::buffer& jobs, const py::buffer& keys, const py::buffer& inputs, const py::buffer& outs,
      const std::vector<py::dict>& rules, const std::vector<py::dict>& compounds,
      std::vector<Family> families, std::vector<int> files, const py::dict& settings, const CutList& given)
      : families_(std::move(families)) {
    const Table<int64_t, 5> job_rows(jobs);
    const Table<int64_t, 4> input_rows(inputs), out_rows(outs);
    const Table<uint64_t, 1> key_rows(keys);
    const size_t variants = families_.empty() ? 1 : families_[0].size();
    if (key_rows.rows() != job_rows.rows() || out_rows.rows() != job_rows.rows())
      throw std::invalid_argument("expected one key and one output for each job");
    if (variants == 0 || job_rows.rows() % variants != 0)
      throw std::invalid_argument("expected the same jobs for every variant");
    const size_t each = job_rows.rows() / variants;
    for (const auto& rule : rules) run_.rules.push_back(make_rule(rule));
    for (const auto& compound : compounds) run_.compounds.push_back(make_compound(compound));
    run_.files = std::move(files);
    regions_.resize(input_rows.rows());
    for (size_t i = 0; i < regions_.size(); ++i) regions_[i] = make_region(input_rows.row(i));
    size_t next = 0;
    for (size_t j = 0; j < job_rows.rows(); ++j) {
      if (each && j % each == 0) next = 0;
      const int64_t* job = job_rows.row(j);
      TensorJob t;
      t.count = job[0];
      t.rule = int32_t(job[1]);
      t.variant = int32_t(j / each);
      t.has_cast = job[2] >= 0;
      if (t.has_cast) t.cast = DType(job[2]);
      t.inputs = int32_t(job[3]);
      t.row = job[4];
      t.key = *key_rows.row(j);
      t.input = regions_.data() + next;
      t.out = make_region(out_rows.row(j));
      next += size_t(t.inputs);
      run_.jobs.push_back(t);
    }
    run_.finished = std::vector<std::atomic<bool>>(run_.jobs.size());
    run_.nan = std::vector<std::atomic<int64_t>>(variants);
    Settings& s = run_.settings;
    s.isa = Isa(settings["isa"].cast<int>());
    for (const auto& group : given) {
      run_.cuts.emplace_back();
      for (const auto& [magnitude, index] : group) run_.cuts.back().push_back({magnitude, index});
    }
    isa_kernels(s.isa);  // refuses an instruction set that the processor lacks
    s.threads = std::max(1, settings["threads"].cast<int>());
    s.tile = std::max<int64_t>(64, settings["tile"].cast<int64_t>() / 64 * 64);
    s.memory = settings["memory"].cast<int64_t>();
    s.cached = settings["cached"].cast<int64_t>();
    s.sigmas = settings["sigmas"].cast<double>();
    s.bracket_bias = settings["bracket_bias"].cast<double>();
    s.drop_behind = settings["drop_behind"].cast<bool>();
    s.spill = settings["spill"].cast<int>();
  }

  // None when done, else (job, input, file, what): input -1 is the output, job -1 no single one, file -1 that
  // of the input; "" means cancelled.
  py::object execute() {
    try {
      py::gil_scoped_release release;
      run_jobs(run_, families_);
    } catch (const StreamError& e) {
      return py::make_tuple(e.job, e.input, e.file, std::string(e.what()));
    } catch (const Cancelled&) {
      return py::make_tuple(-1, -1, -1, std::string());
    }
    return py::none();
  }

  py::dict report() const {
    const Report& r = run_.report;
    py::dict d;
    d["bytes_read"] = r.bytes_read.load();
    d["bytes_written"] = r.bytes_written.load();
    d["elements"] = r.elements.load();
    d["undecided"] = r.undecided.load();
    d["nan"] = std::vector<int64_t>(run_.nan.begin(), run_.nan.end());
    d["searched"] = r.searched.load();
    d["misses"] = r.misses.load();
    d["overflows"] = r.overflows.load();
    return d;
  }
  // Per group (family by family, variant by variant), per expert: (magnitude bits, first flat index not kept
  // among equals).
  CutList cuts() const {
    CutList all;
    for (const auto& group : run_.cuts) {
      all.emplace_back();
      for (const Cut& cut : group) all.back().emplace_back(cut.magnitude, cut.index);
    }
    return all;
  }
  // How many of the leading jobs of every variant have their final output.
  int64_t finished() const {
    const auto& all = run_.finished;
    const auto end = all.begin() + std::ptrdiff_t(all.size() / run_.nan.size());
    return std::find(all.begin(), end, false) - all.begin();
  }
  int64_t bytes_done() const { return run_.report.bytes_read.load(); }
  void cancel() { run_.report.cancelled = true; }

 private:
  RunContext run_;
  std::vector<Region> regions_;
  std::vector<Family> families_;
};

}  // namespace

void bind_stream(py::module_& m) {
  py::class_<Run>(m, "Run")
      .def(py::init<const py::buffer&, const py::buffer&, const py::buffer&, const py::buffer&,
                    const std::vector<py::dict>&, const std::vector<py::dict>&, std::vector<Family>,
                    std::vector<int>, const py::dict&, const CutList&>())
      .def("execute", &Run::execute)
      .def("report", &Run::report)
      .def("cuts", &Run::cuts)
      .def("finished", &Run::finished)
      .def("bytes_done", &Run::bytes_done)
      .def("cancel", &Run::cancel);
}

void bind_cpu(py::module_& m) {
  m.def("isa_available", [](int isa) { return isa_available(Isa(isa)); });
  m.def("best_isa", [] { return int(best_isa()); });
}

}  // namespace pm
