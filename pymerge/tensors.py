"""Merging tensors in memory: torch tensors on CPU or GPU, or numpy arrays, single or in dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypeVar, cast

from pymerge.errors import RecipeError
from pymerge.methods import method_named
from pymerge.operands import expert_list, read_operands
from pymerge.options import PerExpert, as_name
from pymerge.tensor_backends import Wanted, merge_operands
from pymerge.tensor_rule import members_of, rule_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    Tensors = TypeVar(
        "Tensors",
        torch.Tensor,
        "np.ndarray[Any, Any]",
        Mapping[str, torch.Tensor],
        Mapping[str, "np.ndarray[Any, Any]"],
    )


def merge_tensors(
    base: Tensors | None,
    experts: Iterable[Tensors],
    *,
    method: str = "ties",
    preset: str = "mergekit",
    weight: PerExpert | None = None,
    density: PerExpert | None = None,
    gamma: PerExpert | None = None,
    epsilon: PerExpert | None = None,
    lambda_: SupportsFloat | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: str | None = None,
    scope: str | None = None,
    seed: SupportsIndex = 0,
    t: SupportsFloat | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    normalize_weights: bool = True,
    eps: SupportsFloat = 1e-8,
    max_iter: SupportsIndex = 10,
    tol: SupportsFloat = 1e-5,
    filter_wise: bool = False,
    scale: SupportsFloat = 1.0,
    r: SupportsFloat = 0.1,
    alpha: SupportsFloat = 0.2,
    select_topk: SupportsFloat = 1.0,
    claim: SupportsFloat = 0.4,
    votes: SupportsIndex = 2,
    out: Tensors | None = None,
    out_dtype: object = None,
    threads: SupportsIndex | None = None,
    backend: str | None = None,
) -> Tensors:
    """Merge `experts` (all of the base's shape, any mix of f16, bf16, f32, f64) and return the same kind.

    `base`, each of `experts`: a tensor, or a dict of tensors with the same names; never modified. `base` is
    None for `linear`; for `slerp` it is the model at t = 0; `nuslerp` and `multislerp` go without one or are
    relative to it; `karcher` and `passthrough` take it for one more expert. `weight` (1), `density`, `gamma`
    (the share that is outliers), `epsilon`: a number for all experts or one for each; None: the default of
    the method, or of `preset`: "mergekit", "paper", "peft" or "fusionbench", as in a recipe.
    Numbers may be scalars of numpy or torch.
    `threshold_ties`: "first" (default) keeps exactly int(density * n) entries, the lowest flat index first
    among equals, "all" keeps every |d| >= threshold. `scope`: "tensor" (default), or "model" for one
    threshold over a whole dict.
    `t` (slerp), `nuslerp_flatten` and `nuslerp_row_wise`, `normalize_weights` and `eps` (multislerp),
    `max_iter` and `tol` (karcher), `filter_wise` (model_stock), `scale` (passthrough), `epsilon` (della, for
    each expert; ram), `r` and `alpha` (ramplus_tl), `select_topk` (sce), `claim` and `votes` (consensus): as
    in a recipe.
    `out`: where to write, contiguous and apart from the inputs. `out_dtype`: element type of the result
    (default: the inputs' common type). `threads`: None uses every core. `backend`: "cpu",
    "cuda", "triton", "reference", or None for the best that takes the tensors.
    Raises RecipeError for wrong options, BackendError for inputs that no backend takes, CheckpointError where
    the inputs have no such mean.
    """
    row = method_named(as_name(method, "method"))
    members = members_of(row, base, expert_list(experts))
    rule = rule_of(
        row,
        len(members),
        base is not None,
        preset=preset,
        weight=weight,
        density=density,
        gamma=gamma,
        epsilon=epsilon,
        lambda_=lambda_,
        normalize=normalize,
        rescale=rescale,
        threshold_ties=threshold_ties,
        scope=scope,
        seed=seed,
        t=t,
        nuslerp_flatten=nuslerp_flatten,
        nuslerp_row_wise=nuslerp_row_wise,
        normalize_weights=normalize_weights,
        eps=eps,
        max_iter=max_iter,
        tol=tol,
        filter_wise=filter_wise,
        scale=scale,
        r=r,
        alpha=alpha,
        select_topk=select_topk,
        claim=claim,
        votes=votes,
    )
    wanted = Wanted.of(backend, threads, out_dtype)
    if rule.task_vector and base is None:
        raise RecipeError(f"{row.name} works on task vectors, so it needs a base")
    operands = read_operands(base if rule.task_vector else None, members)
    return cast("Tensors", merge_operands(operands, [rule], [out], wanted)[0][0])
