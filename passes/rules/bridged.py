"""Ops that have no rule on purpose: they run at the student's width, between bridges.

Ops that no line names and that torch composes of others are taken apart (``decompose``); what is
left then has neither a rule nor a reason, as a library's own op: it is bridged, too.
"""

from __future__ import annotations

from typing import Any

_BRIDGED = {
    "it draws numbers, as many and in the order as at the student's width": (
        "rand randn randint randperm rand_like.generator randn_like.generator randint_like normal "
        "normal_functional uniform exponential geometric cauchy log_normal random poisson binomial "
        "multinomial bernoulli.Tensor rrelu_with_noise rrelu_with_noise_functional "
        "fractional_max_pool2d fractional_max_pool3d _standard_gamma _sample_dirichlet "
        "native_dropout _fused_dropout _sobol_engine_draw _philox_normal _philox_uniform "
        "_philox_key_split _philox_key_fold_in"
    ),
    "how large its result is depends on values": (
        "nonzero nonzero_numpy nonzero_static argwhere masked_select unique_consecutive unique_dim "
        "unique_dim_consecutive _unique _unique2 repeat_interleave.Tensor "
        "repeat_interleave.self_Tensor bincount one_hot combinations ctc_loss _ctc_loss "
        "tensor_split.tensor_indices_or_sections narrow.Tensor"
    ),
    "it counts elements, of which copies are no more": (
        "histc histogram histogramdd _histogramdd_bin_edges _histogramdd_from_bin_cts "
        "_histogramdd_from_bin_tensors hash_tensor"
    ),
    "a factorization mixes all rows and columns": (
        "linalg_qr linalg_svd _linalg_svd svd linalg_svdvals linalg_eig linalg_eigvals "
        "_linalg_eigvals linalg_eigh linalg_eigvalsh _linalg_eigh linalg_lu linalg_lu_factor "
        "linalg_lu_factor_ex linalg_lu_solve _lu_with_info lu_solve lu_unpack linalg_ldl_factor "
        "linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_pinv pinverse linalg_cond "
        "linalg_matrix_rank linalg_tensorinv linalg_tensorsolve linalg_householder_product orgqr "
        "ormqr geqrf cholesky cholesky_inverse nuclear_norm triangular_solve linalg_solve_ex "
        "_linalg_solve_ex _linalg_det _linalg_slogdet linalg_matrix_sqrth linalg_polar "
        "_spsolve _linalg_check_errors qr"
    ),
    "every class has a place of its own": (
        "nll_loss_forward nll_loss2d_forward multi_margin_loss multilabel_margin_loss "
        "multilabel_margin_loss_forward"
    ),
    "elements are taken one after the other": (
        "masked_scatter put segment_reduce as_strided_scatter diagonal_scatter view.dtype "
        "pad_sequence _chunk_cat flatten_dense_tensors unflatten_dense_tensors gradient block_diag "
        "to_padded_tensor"
    ),
    "it writes into its weight": "embedding_renorm embedding_renorm_",
    "it searches for one number": "bucketize.Scalar searchsorted.Scalar isin.Scalar_Tensor",
    "numbers between two tensors' own are counted off": (
        "linspace.Tensor_Tensor linspace.Tensor_Scalar linspace.Scalar_Tensor "
        "logspace.Tensor_Tensor logspace.Tensor_Scalar logspace.Scalar_Tensor"
    ),
}
REASONS = {name: why for why, names in _BRIDGED.items() for name in names.split()}


def reason(op: Any) -> str:
    """Why an overload has no rule; empty if nobody said so."""
    if not hasattr(op, "_schema"):
        return ""
    name = op._schema.name.removeprefix("aten::")
    return REASONS.get(name) or REASONS.get(f"{name}.{op._schema.overload_name}", "")
