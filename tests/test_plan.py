"""Plans: every problem that headers show, all at once; and jobs that name the right bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made import SHAPES, recipe_text, write_checkpoint

from pymerge.checkpoint.header import Header, TensorEntry, read_header
from pymerge.checkpoint.index import Checkpoint, Seen, Shard, TensorRef
from pymerge.dtypes import DType
from pymerge.errors import ProblemList, PymergeError
from pymerge.job import Region
from pymerge.plan_memory import budget
from pymerge.planner import Plan, make_plan
from pymerge.recipe import parse_recipe
from pymerge.rule import Scope

Change = Callable[[dict[str, tuple[int, ...]]], object]


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", 0, shards=2)
    write_checkpoint(tmp_path / "one", 1)
    write_checkpoint(tmp_path / "two", 2, shards=3)
    return tmp_path


def planned(folder: Path, out: str | None = None, method: str = "ties", **parameters: object) -> Plan:
    shard = parameters.pop("max_shard_bytes", 10**9)
    dtype = parameters.pop("dtype", None)
    text = recipe_text(method, ["one", "two"], "base", **parameters)  # type: ignore[arg-type]
    where = None if out is None else folder / out
    return make_plan(parse_recipe(text, folder), where, max_shard_bytes=shard, dtype=dtype)  # type: ignore[arg-type]


def problems(
    folder: Path, out: str | None = None, method: str = "ties", **parameters: object
) -> tuple[str, ...]:
    with pytest.raises(ProblemList) as caught:
        planned(folder, out, method, **parameters)
    return caught.value.problems


def test_every_region_holds_the_tensor_s_own_bytes(family: Path) -> None:
    plan = planned(family, max_shard_bytes=2000)
    assert len(plan.layouts) > 1
    jobs = [job for shard in plan.jobs for job in shard]
    assert {job.name: job.count for job in jobs} == {name: _count(shape) for name, shape in SHAPES.items()}
    paths = [family / "base", family / "one", family / "two"]
    for job in jobs:
        assert job.base is not None
        for folder, region in zip(paths, job.inputs, strict=True):
            assert isinstance(region, Region)
            path = plan.shards[region.file].path
            entry = read_header(path).tensors[job.name]
            assert path.parent == folder
            assert (region.dtype, region.start) == (entry.dtype, entry.begin)
    for number, (layout, shard) in enumerate(zip(plan.layouts, plan.jobs, strict=True)):
        assert [job.name for job in shard] == [tensor.name for tensor in layout.tensors]
        starts = [job.out.start for job in shard]
        assert starts == sorted(starts)
        for job in shard:
            assert job.out == Region(DType.BF16, layout.offsets[job.name], len(plan.shards) + number)


def test_tensors_share_one_rule(family: Path) -> None:
    plan = planned(family, density=0.5)
    assert {id(job.rule) for shard in plan.jobs for job in shard} == {id(plan.rules[0])}


def test_the_base_may_be_listed_and_is_no_expert(family: Path) -> None:
    text = recipe_text("ties", ["base", "one", "two"], "./base")
    plan = make_plan(parse_recipe(text, family), None)
    assert plan.experts == 2
    assert [source.is_base for source in plan.inputs] == [True, False, False]
    assert any("it is the base, not an expert" in note for note in plan.notes)


def test_the_base_of_linear_is_one_of_the_models(family: Path) -> None:
    """Where it is not listed it is the last of them, and needs a weight as any does."""
    plan = planned(family, method="linear", weight_=2.0)
    assert [source.checkpoint.path.name for source in plan.inputs] == ["one", "two", "base"]
    assert all(job.base is None for shard in plan.jobs for job in shard)
    assert plan.rules[0].weights == (1.0, 1.0, 2.0)
    assert problems(family, method="linear") == (
        f"linear needs a weight for {family}/base; it is the base_model, and as models does not list it, it"
        " is one more of them",
    )
    listed = make_plan(parse_recipe(recipe_text("linear", ["base", "one"], "base"), family), None)
    assert listed.experts == 2
    assert not listed.notes
    alone = make_plan(parse_recipe(recipe_text("linear", ["two", "one"], None), family), None)
    assert alone.side_files["config.json"]


def test_what_has_no_effect_is_noted(family: Path) -> None:
    notes = planned(family, method="task_arithmetic", density=0.5, rescale=True, scope="model").notes
    assert notes == (
        "density has no effect with task_arithmetic",
        "rescale has no effect with task_arithmetic",
        "scope has no effect with task_arithmetic",
    )
    assert planned(family, density=0.5, rescale=True, scope="model", threshold_ties="all").notes == ()
    assert (
        "lambda has no effect with linear" in planned(family, method="linear", lambda_=2.0, weight_=1.0).notes
    )


@pytest.mark.parametrize(
    ("extra", "dtype", "expected", "cast"),
    [
        ("", None, DType.F32, None),
        ("dtype: float16", None, DType.F16, DType.F16),
        ("out_dtype: float64", None, DType.F64, None),
        ("{dtype: float16, out_dtype: float32}", None, DType.F32, DType.F16),
        ("{dtype: float16, out_dtype: float32}", DType.BF16, DType.BF16, DType.F16),
    ],
)
def test_output_types(
    extra: str, dtype: DType | None, expected: DType, cast: DType | None, tmp_path: Path
) -> None:
    """bf16 beside f16 promotes to f32; integers stay and are copied."""
    dtypes = {"norm": DType.I32, "mask": DType.BOOL}
    shapes = {"w": (4, 4), "norm": (8,), "mask": (3,)}
    write_checkpoint(tmp_path / "base", 0, shapes=shapes, dtypes=dtypes)
    write_checkpoint(tmp_path / "one", 1, shapes=shapes, dtypes=dtypes, dtype=DType.F16)
    text = recipe_text("ties", ["one"], "base")
    lines = extra.strip("{}").replace(", ", "\n")
    text = f"{lines}\n" + "\n".join(f"{k}: {v}" for k, v in _flow(text).items())
    plan = make_plan(parse_recipe(text, tmp_path), None, dtype=dtype)
    jobs = {job.name: job for shard in plan.jobs for job in shard}
    assert (jobs["w"].out.dtype, jobs["w"].cast, jobs["w"].rule) == (expected, cast, plan.rules[0])
    for name, kind in dtypes.items():
        assert (jobs[name].out.dtype, jobs[name].cast, jobs[name].rule) == (kind, None, None)


def _flow(text: str) -> dict[str, str]:
    import json

    return {key: json.dumps(value) for key, value in json.loads(text).items()}


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _without(name: str) -> Change:
    return lambda shapes: shapes.pop(name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without("norm"), "expert {two} lacks tensor 'norm' of base {base}"),
        (lambda shapes: shapes.update(zz=(1,)), "expert {two} has tensor 'zz', which base {base} lacks"),
        (
            lambda shapes: shapes.update({"b.weight": (71,)}),
            "expert {two}: tensor 'b.weight' has shape [71], expected [70] as in base {base}",
        ),
        (
            lambda shapes: shapes.update({"a.weight": (50, 40)}),
            "expert {two}: tensor 'a.weight' has shape [50, 40], expected [40, 50] as in base {base}",
        ),
    ],
)
def test_names_and_shapes(change: Change, sentence: str, family: Path) -> None:
    shapes = dict(SHAPES)
    change(shapes)
    for path in (family / "two").iterdir():
        path.unlink()
    write_checkpoint(family / "two", 2, shapes=shapes)
    expected = sentence.format(base=family / "base", two=family / "two")
    assert problems(family) == (expected,)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    shapes = {f"t{n:02}": (2,) for n in range(50)}
    write_checkpoint(tmp_path / "base", 0, shapes=shapes)
    write_checkpoint(tmp_path / "one", 1, shapes={"t00": (2,)})
    write_checkpoint(tmp_path / "two", 2, shapes={name: (3,) for name in shapes})
    found = problems(tmp_path)
    assert found[0] == (
        f"expert {tmp_path}/one lacks 49 tensors ('t01', 't02', 't03' and 46 more) of base {tmp_path}/base"
    )
    assert len(found) == 5
    assert found[4] == f"expert {tmp_path}/two: 47 more tensors that do not fit"


def test_types_that_do_not_merge(tmp_path: Path) -> None:
    shapes = {"w": (4,), "i": (4,), "q": (4,), "x": (4,)}
    write_checkpoint(tmp_path / "base", 0, shapes=shapes, dtypes={"i": DType.I32, "x": DType.I64})
    write_checkpoint(tmp_path / "one", 1, shapes=shapes, dtypes={"i": DType.I64, "q": DType.F8_E4M3})
    write_checkpoint(tmp_path / "two", 2, shapes=shapes, dtypes={"i": DType.I32, "x": DType.I64})
    one, base = tmp_path / "one", tmp_path / "base"
    assert problems(tmp_path) == (
        f"expert {one}: tensor 'q' is F8_E4M3, which cannot be merged",
        f"expert {one}: tensor 'i' has dtype I64, expected I32 as in base {base}",
        f"expert {one}: tensor 'q' has dtype F8_E4M3, expected BF16 as in base {base}",
        f"expert {one}: tensor 'x' has dtype BF16, expected I64 as in base {base}",
    )


def test_quantized_inputs_are_refused(family: Path) -> None:
    (family / "one" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert problems(family) == (
        f"expert {family}/one is quantized (quantization_config in config.json), which is not supported",
    )
    (family / "one" / "config.json").write_text('{"quantization_config": null}')
    planned(family)


def test_problems_of_all_kinds_come_together(family: Path) -> None:
    (family / "one" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (family / "two" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    (family / "out").mkdir()
    found = problems(family, "out", "teis", density=7.0)
    assert len(found) == 4
    assert "unknown merge method 'teis'; did you mean ties?" in found[0]
    assert "git-LFS" in found[1]
    assert "is quantized" in found[2]
    assert "exists already" in found[3]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"density": 1.5}, "density of {one} is 1.5, which is outside 0 to 1"),
        (
            {"method": "task_arithmetic", "weight": 0.0, "normalize": True},
            "the weights of task_arithmetic sum to 0, so they cannot be normalized",
        ),
    ],
)
def test_numbers_of_the_recipe(parameters: dict[str, object], sentence: str, family: Path) -> None:
    assert problems(family, **parameters)[0] == sentence.format(one=family / "one")  # type: ignore[arg-type]


def test_weights_and_bases_that_are_missing(family: Path) -> None:
    text = "merge_method: ties\nmodels: [{model: one}, {model: two, parameters: {weight: 1}}]"
    with pytest.raises(ProblemList) as caught:
        make_plan(parse_recipe(text, family), None)
    assert caught.value.problems == (
        "ties needs base_model: the model that the experts were tuned from",
        f"ties needs a weight for {family}/one",
    )
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: base}]"
    with pytest.raises(ProblemList, match="models lists no expert beside the base"):
        make_plan(parse_recipe(text, family), None)


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("one", "exists already"),
        ("one/out", "lies inside the input"),
        ("link/out", "lies inside the input"),
        ("base/deep/er", "lies inside the input"),
        ("file/out", "is not a folder"),
        ("dangling", "exists already"),
    ],
)
def test_outputs_that_are_in_the_way(out: str, part: str, family: Path) -> None:
    (family / "link").symlink_to(family / "one")
    (family / "dangling").symlink_to(family / "nowhere")
    (family / "file").write_text("")
    assert any(part in problem for problem in problems(family, out))


def test_an_input_inside_the_output(family: Path) -> None:
    text = recipe_text("linear", ["one"], None)
    with pytest.raises(ProblemList, match=r"input .*/one lies inside the output"):
        make_plan(parse_recipe(text, family), family)


def test_an_output_beside_an_input_file_is_fine(family: Path) -> None:
    file = family / "one" / "model.safetensors"
    plan = make_plan(parse_recipe(recipe_text("linear", [file], None), family), family / "one" / "merged")
    assert plan.tensors == len(SHAPES)


def test_too_little_disk_space(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (family / "base" / "tokenizer.json").write_text("x" * 5000)
    plan = planned(family)
    need = plan.disk_bytes
    assert need > plan.bytes_written + 5000

    class Full:
        f_bavail, f_frsize = need - 1, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    assert problems(family, "out") == (
        f"{family}/out needs {need:,} bytes of disk space, {need - 1:,} are free",
    )
    # What an interrupted run has written already is not needed again.
    (family / "out.partial").mkdir()
    (family / "out.partial" / "model.safetensors.part").write_bytes(b"x" * 4096)
    planned(family, "out")


def test_the_numbers_of_a_plan(family: Path) -> None:
    plan = planned(family, "out", density=0.5, scope="model")
    elements = sum(_count(shape) for shape in SHAPES.values())
    summary = plan.summary()
    assert (plan.tensors, plan.elements, plan.passes, plan.scope) == (len(SHAPES), elements, 1, Scope.MODEL)
    assert plan.bytes_read == 3 * 2 * elements
    assert plan.bytes_written == sum(layout.size for layout in plan.layouts)
    assert summary["bytes_read"] == plan.bytes_read
    assert summary["experts"] == [str(family / "one"), str(family / "two")]
    assert summary["disk_space_free"] is not None
    assert planned(family, method="dare_ties", density=0.5).bytes_read == 2 * plan.bytes_read
    assert "ties, scope model" in plan.describe()
    assert f"expert       {family}/two (weight 1, density 0.5)" in plan.describe()
    plain = planned(family, method="linear", weight_=1.0).describe()
    assert "method       linear, normalize true\n" in plain
    assert f"expert       {family}/two (weight 1)\n" in plain


def test_the_digest_tells_runs_apart(family: Path) -> None:
    first = planned(family).digest()
    assert planned(family).digest() == first
    assert planned(family, density=0.5).digest() != first
    assert planned(family, dtype=DType.F32).digest() != first
    assert planned(family, max_shard_bytes=2000).digest() != first
    os.utime(family / "one" / "model.safetensors", ns=(1, 1))
    assert planned(family).digest() != first


def test_a_memory_limit_is_kept_or_refused(family: Path) -> None:
    plan = planned(family, density=0.5)
    for limit in (3 << 20, 10 << 20, 200 << 20):
        shares = budget(plan, threads=2, max_memory=limit)
        assert shares.total <= limit
        assert shares.lists > 0
    with pytest.raises(PymergeError, match="bytes of memory are too little: 64 threads on 3 inputs need"):
        budget(plan, threads=64, max_memory=1 << 20)
    assert budget(planned(family, method="task_arithmetic")).lists == 0


@pytest.mark.parametrize(
    ("weight", "rules"), [(1.0, 1), ([{"filter": "expert.1", "value": [0, 1]}, {"value": [1, 2]}], 119)]
)
def test_a_mixture_of_experts_is_planned_in_seconds(
    weight: object, rules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """36,000 tensors in nine models; the bound is loose, a quadratic step would exceed it a hundredfold."""
    names = [f"layer.{n // 600}.expert.{n % 600}" for n in range(36_000)]
    entries = {name: TensorEntry(DType.BF16, (2, 2), 64 + 8 * n, 72 + 8 * n) for n, name in enumerate(names)}
    header = Header(entries, {}, "digest", 64 + 8 * 36_000, 0)

    def synthetic(path: Path, seen: Seen) -> Checkpoint:
        refs = {name: TensorRef(0, entry) for name, entry in entries.items()}
        return Checkpoint(path, (Shard(path / "model.safetensors", header),), refs)

    monkeypatch.setattr("pymerge.plan_inputs.open_checkpoint", synthetic)
    names = [f"e{k}" for k in range(8)]
    for name in [*names, "base"]:
        (tmp_path / name).mkdir()
    text = recipe_text("ties", names, "base", weight=weight, density=0.5)  # type: ignore[arg-type]
    recipe = parse_recipe(text, tmp_path)
    began = time.process_time()
    plan = make_plan(recipe, tmp_path / "out")
    seconds = time.process_time() - began
    assert (plan.tensors, len(plan.inputs)) == (36_000, 9)
    assert len({id(job.rule) for shard in plan.jobs for job in shard}) == len(plan.rules) == rules
    assert seconds < 30


def test_a_plan_states_what_a_preset_assumes(family: Path) -> None:
    text = "merge_method: ties\npreset: paper\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    said = make_plan(parse_recipe(text, family), family / "out").describe()
    assert "(weight 1, density 0.2)" in said
    assert "preset paper, scope model" in said


def test_what_all_tensors_share_is_said_once(family: Path) -> None:
    cases = [{"filter": "a", "value": 0.5}, {"value": 1.0}]
    text = recipe_text("ties", ["one", "two"], "base", lambda_=cases)
    said = make_plan(parse_recipe(text, family), family / "out").describe()
    assert "method       ties, scope tensor, threshold_ties first, rescale false, normalize true\n" in said
    assert "lambda       ['a': 0.5; else: 1]" in said
