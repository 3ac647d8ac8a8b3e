"""Changes that make no difference to any result, and why. Key: file, the statement before and after."""

_SVD = "u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLING, niter=_PASSES)"
_NEAR = "how near the random method comes to the best factors; both come near enough"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "attention",
        "return x.unflatten(-1, (heads, -1)).transpose(1, 2)",
        "return x.unflatten(-1, (heads, -1)).transpose(2, 1)",
    ): "transposing is symmetric",
    (
        "attention",
        "return out.transpose(1, 2).flatten(2)",
        "return out.transpose(2, 1).flatten(2)",
    ): "transposing is symmetric",
    (
        "attention",
        "if len(q) > step:",
        "if len(q) >= step:",
    ): "one part is the whole",
    (
        "attention",
        "parts = zip(q.split(step), k.split(step), v.split(step), strict=True)",
        "parts = zip(q.split(step), k.split(step), v.split(step))",
    ): "the three are of one length",
    (
        "attention",
        "parts = zip(q.split(step), k.split(step), v.split(step), strict=True)",
        "parts = zip(q.split(step), k.split(step), v.split(step), strict=False)",
    ): "the three are of one length",
    (
        "schedule",
        "return [min(1 + i * ratio, train_steps - 1) for i in range(steps)]",
        "return [min(train_steps - 1, 1 + i * ratio) for i in range(steps)]",
    ): "the smaller of two is the same in any order",
    (
        "schedule",
        "def sampling_sigmas(sigmas: Tensor, steps: int, last: str='clip noise level') -> Tensor:",
        "def sampling_sigmas(sigmas: Tensor, steps: int, last: str='clip noise levelx') -> Tensor:",
    ): "everything but zero means it",
    (
        "weights",
        "temporary = Path(scratch, 'motion')",
        "temporary = Path(scratch, 'motionx')",
    ): "nobody reads it under that name",
    (
        "weights",
        "mask = os.umask(0)",
        "mask = os.umask(1)",
    ): "it is put back at once",
    ("low_rank", "_OVERSAMPLING, _PASSES = (8, 4)", "_OVERSAMPLING, _PASSES = (9, 4)"): _NEAR,
    ("low_rank", "_OVERSAMPLING, _PASSES = (8, 4)", "_OVERSAMPLING, _PASSES = (8, 5)"): _NEAR,
    ("low_rank", _SVD, "u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLING)"): _NEAR,
    (
        "low_rank",
        "if rank + _OVERSAMPLING >= min(matrix.shape):",
        "if rank + _OVERSAMPLING > min(matrix.shape):",
    ): "of a matrix that small, both methods give the same",
    (
        "low_rank",
        "u, s, vh = torch.linalg.svd(matrix, full_matrices=False)",
        "u, s, vh = torch.linalg.svd(matrix)",
    ): "the vectors that it adds are not used",
    (
        "low_rank",
        "u, s, vh = torch.linalg.svd(matrix, full_matrices=False)",
        "u, s, vh = torch.linalg.svd(matrix, full_matrices=True)",
    ): "the vectors that it adds are not used",
    ("low_rank", "torch.manual_seed(0)", "torch.manual_seed(1)"): "any seed will do, so long as it is the same",
    (
        "norm",
        "return F.silu(y, inplace=True) if silu else y",
        "return F.silu(y) if silu else y",
    ): "the result is the same; only memory is saved",
    (
        "norm",
        "return F.silu(y, inplace=True) if silu else y",
        "return F.silu(y, inplace=False) if silu else y",
    ): "the result is the same; only memory is saved",
}
