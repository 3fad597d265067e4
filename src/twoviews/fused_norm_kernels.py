"""The Triton kernels of fused_norm.py. Importing this imports Triton, which only CUDA builds of torch bring.

Activations are rows of channels, [N * H * W, C] in memory. Row r of a part is a row of the images that belong to it
(image n is in part n mod parts), so a program that stays within one part needs one vector of statistics. Statistics and
all arithmetic are float32.

A program is (block of channels, part, number): neighbours read what lies side by side. Passes that add up take every n-th
tile of rows, and so go through memory from its beginning to its end, together; the passes after them go backwards, which
finds what was read last in the L2 cache. All sizes but that of a row of channels are left unspecialised, so that kernels
are compiled once for all maps of a network.
"""

from typing import no_type_check

import triton
import triton.language as tl

SIZES = ["rows", "chunk", "parts", "size", "multiplier", "shift"]


@triton.jit
@no_type_check
def _memory_rows(r, part, parts, size, multiplier, shift):
    """Rows in memory (int64) of the rows r of a part; r * multiplier >> shift is the r // size of `division`."""
    image = (r.to(tl.int64) * multiplier) >> shift
    return r + (image * (parts - 1) + part) * size


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def statistics(
    x, partial, rows, channels, parts, size, multiplier, shift,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean of what each program takes, and sum of squares around it: partial, [2, parts, programs, C].

    Every place of a tile has its own mean of what passes there (Welford), and at the end they are combined (Chan et al.).
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    first = tl.program_id(2) * ROWS
    step = tl.num_programs(2) * ROWS
    offset = tl.arange(0, ROWS)
    known = c < channels
    mean = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    square = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for start in tl.range(first, rows, step, num_stages=STAGES):
        r = start + offset
        inside = r < rows
        place = _memory_rows(r, part, parts, size, multiplier, shift)[:, None] * channels + c[None, :]
        value = tl.load(x + place, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
        share = step / (step + start - first)  # 1 / (tiles so far)
        delta = value - mean
        mean += delta * tl.where(inside, share, 0.0)[:, None]
        square += delta * delta * tl.where(inside, 1.0 - share, 0.0)[:, None]
    count = ((rows - first - offset + step - 1) // step).to(tl.float32)  # that passed each place
    whole = tl.sum(mean * (count / tl.sum(count, axis=0))[:, None], axis=0)
    apart = mean - whole[None, :]
    square = tl.sum(square + apart * apart * count[:, None], axis=0)
    out = partial + (part * tl.num_programs(2) + tl.program_id(2)) * channels + c
    tl.store(out, whole, mask=known)
    tl.store(out + parts * tl.num_programs(2) * channels, square, mask=known)


@triton.jit(do_not_specialize=["rows", "height", "chunks", "parts"])
@no_type_check
def finish_statistics(
    partial, moments, running_mean, running_var, tracked, rows, height, chunks, channels, parts, momentum, eps,
    TRACKED: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of each part: moments, [2, parts, C]; and the running statistics.

    `chunks` programs of `statistics` took every `chunks`-th tile of `height` rows.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    number = tl.arange(0, CHUNKS)
    known = c < channels
    place = (part[:, None, None] * chunks + number[None, :, None]) * channels + c[None, None, :]
    inside = (part < parts)[:, None, None] & (number < chunks)[None, :, None] & known[None, None, :]
    tiles = (rows + height - 1) // height
    missing = tl.where(number == (tiles - 1) % chunks, tiles * height - rows, 0)  # of the last tile
    count = tl.where(number < chunks, (tiles - number + chunks - 1) // chunks * height - missing, 0)
    count = count.to(tl.float32)[None, :, None]
    means = tl.load(partial + place, mask=inside, other=0.0)
    squares = tl.load(partial + parts * chunks * channels + place, mask=inside, other=0.0)
    old_mean = tl.load(running_mean + c, mask=known, other=0.0)
    old_var = tl.load(running_var + c, mask=known, other=0.0)
    mean = tl.sum(means * (count / rows), axis=1)
    apart = means - mean[:, None, :]
    square = tl.sum(squares + apart * apart * count, axis=1)
    out = moments + part[:, None] * channels + c[None, :]
    inside = (part < parts)[:, None] & known[None, :]
    tl.store(out, mean, mask=inside)
    tl.store(out + parts * channels, tl.rsqrt(square / rows + eps), mask=inside)
    # The mean over the parts of what the batch norm of each would make of them.
    batch_mean = tl.sum(tl.where(inside, mean, 0.0), axis=0) / parts
    batch_var = tl.sum(tl.where(inside, square / (rows - 1), 0.0), axis=0) / parts
    tl.store(running_mean + c, (1 - momentum) * old_mean + momentum * batch_mean, mask=known)
    tl.store(running_var + c, (1 - momentum) * old_var + momentum * batch_var, mask=known)
    if TRACKED:
        tl.store(tracked, tl.load(tracked) + 1, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def normalise(
    x, residual, y, weight, bias, moments, rows, chunk, channels, parts, size, multiplier, shift,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The normalised rows, scaled, with offset, residual and ReLU."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * chunk
    last = tl.minimum(first + chunk, rows)
    known = c < channels
    mean = tl.load(moments + part * channels + c, mask=known, other=0.0)
    rstd = tl.load(moments + (parts + part) * channels + c, mask=known, other=0.0)
    scale = tl.load(weight + c, mask=known, other=0.0).to(tl.float32) * rstd
    offset = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        inside = (r < last)[:, None] & known[None, :]
        place = _memory_rows(r, part, parts, size, multiplier, shift)[:, None] * channels + c[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * scale[None, :] + offset[None, :]
        if RESIDUAL:
            value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # what is no number stays so
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def sums(
    x, grad, y, masked, weight, bias, moments, partial, rows, channels, parts, size, multiplier, shift,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program's sums of g and of g * (x - mean): partial, [2, parts, programs, C]; g is the gradient below the ReLU.

    Without a residual the input says where the ReLU is open. With one the output does, and g is written to `masked`: it
    is the residual's gradient, and `input_gradient` reads it instead of gradient and output.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    known = c < channels
    mean = tl.load(moments + part * channels + c, mask=known, other=0.0)
    if RELU and not RESIDUAL:
        rstd = tl.load(moments + (parts + part) * channels + c, mask=known, other=0.0)
        scale = tl.load(weight + c, mask=known, other=0.0).to(tl.float32) * rstd
        offset = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    product = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for start in tl.range(tl.program_id(2) * ROWS, rows, tl.num_programs(2) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & known[None, :]
        place = _memory_rows(r, part, parts, size, multiplier, shift)[:, None] * channels + c[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            if RESIDUAL:
                out = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
                g = tl.where(out <= 0, 0.0, g)
                tl.store(masked + place, g.to(masked.dtype.element_ty), mask=inside)
            else:
                g = tl.where(value * scale[None, :] + offset[None, :] <= 0, 0.0, g)
        total += g
        product += g * value
    out = partial + (part * tl.num_programs(2) + tl.program_id(2)) * channels + c
    tl.store(out, tl.sum(total, axis=0), mask=known)
    tl.store(out + parts * tl.num_programs(2) * channels, tl.sum(product, axis=0), mask=known)


@triton.jit(do_not_specialize=["rows", "chunks", "parts"])
@no_type_check
def finish_sums(
    partial, moments, weight, factors, weight_grad, bias_grad, rows, chunks, channels, parts,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What `input_gradient` multiplies x - mean by, and what it subtracts: factors, [2, parts, C]; and two gradients."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    number = tl.arange(0, CHUNKS)
    known = c < channels
    place = (part[:, None, None] * chunks + number[None, :, None]) * channels + c[None, None, :]
    inside = (part < parts)[:, None, None] & (number < chunks)[None, :, None] & known[None, None, :]
    total = tl.sum(tl.load(partial + place, mask=inside, other=0.0), axis=1)
    product = tl.sum(tl.load(partial + parts * chunks * channels + place, mask=inside, other=0.0), axis=1)
    inside = (part < parts)[:, None] & known[None, :]
    out = part[:, None] * channels + c[None, :]
    rstd = tl.load(moments + parts * channels + out, mask=inside, other=0.0)
    scale = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)[None, :] * rstd
    product *= rstd  # with the normalised input
    tl.store(factors + out, scale * rstd * product / rows, mask=inside)
    tl.store(factors + parts * channels + out, scale * total / rows, mask=inside)
    tl.store(weight_grad + c, tl.sum(product, axis=0), mask=known)
    tl.store(bias_grad + c, tl.sum(total, axis=0), mask=known)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def input_gradient(
    x, grad, out, weight, bias, moments, factors, rows, chunk, channels, parts, size, multiplier, shift,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of x; RELU: `grad` is that of the output of a ReLU that the input says is open or not."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * chunk
    last = tl.minimum(first + chunk, rows)
    known = c < channels
    mean = tl.load(moments + part * channels + c, mask=known, other=0.0)
    rstd = tl.load(moments + (parts + part) * channels + c, mask=known, other=0.0)
    scale = tl.load(weight + c, mask=known, other=0.0).to(tl.float32) * rstd
    offset = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    slope = tl.load(factors + part * channels + c, mask=known, other=0.0)
    level = tl.load(factors + (parts + part) * channels + c, mask=known, other=0.0)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        inside = (r < last)[:, None] & known[None, :]
        place = _memory_rows(r, part, parts, size, multiplier, shift)[:, None] * channels + c[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            g = tl.where(value * scale[None, :] + offset[None, :] <= 0, 0.0, g)
        value = scale[None, :] * g - slope[None, :] * value - level[None, :]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
