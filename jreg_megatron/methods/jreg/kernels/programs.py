"""The Triton programs: displacement and its gradients for a tile of rows.

Every number is read once and written once: a row that fits into the tile stays in registers, so norms,
Psi and gradients need one read. A wider row is read again for each of them, from the cache. No atomics, so
results do not vary. ``COMPUTE`` is the type to compute in. The strides count elements of a state
``[s, b, h]``, whose hidden axis is contiguous, as is all that is written.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(rows, batch, stride_s, stride_b):
    """Where a tile's rows begin in a state ``[s, b, h]``, in elements."""
    return (rows // batch).to(tl.int64) * stride_s + (rows % batch).to(tl.int64) * stride_b


@triton.jit
def _inverse_norm(square, COMPUTE: tl.constexpr):
    """``1 / sqrt(square)``, rounded as torch rounds it; 0 for a row of norm zero."""
    if COMPUTE == tl.float32:  # noqa: SIM108, SIM300 (Triton compiles the branch that is taken)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(square))
    else:
        inverse = 1.0 / tl.sqrt(square)
    return tl.where(square == 0, 0.0, inverse)


@triton.jit
def _psi(square_in, square_out, square):
    """Psi from two squared norms and ``|u - v|^2``."""
    return tl.where((square_in == 0) | (square_out == 0), 0.5, square / 4)


@triton.jit
def _whole_rows(in_rows, out_rows, column, mask, COMPUTE: tl.constexpr):
    """Of rows that fit into a tile: the unit vectors, the inverse norms, Psi."""
    h_in = tl.load(in_rows + column, mask=mask, other=0.0).to(COMPUTE)
    h_out = tl.load(out_rows + column, mask=mask, other=0.0).to(COMPUTE)
    square_in = tl.sum(h_in * h_in, axis=1)
    square_out = tl.sum(h_out * h_out, axis=1)
    inverse_in = _inverse_norm(square_in, COMPUTE)
    inverse_out = _inverse_norm(square_out, COMPUTE)
    u = h_in * inverse_in[:, None]
    v = h_out * inverse_out[:, None]
    psi = _psi(square_in, square_out, tl.sum((u - v) * (u - v), axis=1))
    return u, v, inverse_in, inverse_out, psi


@triton.jit
def _looped_rows(in_rows, out_rows, column, is_row, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """Of rows that are wider than a tile: the inverse norms, Psi."""
    square_in = tl.zeros(is_row.shape, COMPUTE)
    square_out = tl.zeros(is_row.shape, COMPUTE)
    for start in range(0, WIDTH, column.shape[1]):
        mask = is_row[:, None] & (start + column < WIDTH)
        h_in = tl.load(in_rows + start + column, mask=mask, other=0.0).to(COMPUTE)
        h_out = tl.load(out_rows + start + column, mask=mask, other=0.0).to(COMPUTE)
        square_in += tl.sum(h_in * h_in, axis=1)
        square_out += tl.sum(h_out * h_out, axis=1)
    inverse_in = _inverse_norm(square_in, COMPUTE)
    inverse_out = _inverse_norm(square_out, COMPUTE)
    square = tl.zeros(is_row.shape, COMPUTE)
    for start in range(0, WIDTH, column.shape[1]):
        mask = is_row[:, None] & (start + column < WIDTH)
        h_in = tl.load(in_rows + start + column, mask=mask, other=0.0).to(COMPUTE)
        h_out = tl.load(out_rows + start + column, mask=mask, other=0.0).to(COMPUTE)
        difference = h_in * inverse_in[:, None] - h_out * inverse_out[:, None]
        square += tl.sum(difference * difference, axis=1)
    return inverse_in, inverse_out, _psi(square_in, square_out, square)


@triton.jit
def displacement_kernel(
    in_ptr,
    out_ptr,
    psi_ptr,
    num_rows,
    batch,
    in_s,
    in_b,
    out_s,
    out_b,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Psi of a tile of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    column = tl.arange(0, COLUMNS)[None, :]
    in_rows = (in_ptr + _rows_of(row, batch, in_s, in_b))[:, None]
    out_rows = (out_ptr + _rows_of(row, batch, out_s, out_b))[:, None]
    if WIDTH <= COLUMNS:
        mask = is_row[:, None] & (column < WIDTH)
        _, _, _, _, psi = _whole_rows(in_rows, out_rows, column, mask, COMPUTE)
    else:
        _, _, psi = _looped_rows(in_rows, out_rows, column, is_row, WIDTH, COMPUTE)
    tl.store(psi_ptr + row, psi, mask=is_row)


@triton.jit
def gradients_kernel(
    in_ptr,
    out_ptr,
    grad_ptr,
    coefficient_ptr,
    weight_ptr,
    grad_in_ptr,
    total_ptr,
    numbers_ptr,
    above_ptr,
    above_numbers_ptr,
    factor,
    first,
    num_rows,
    batch,
    in_s,
    in_b,
    out_s,
    out_b,
    grad_s,
    grad_b,
    weight_s,
    weight_b,
    above_s,
    above_b,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    NEEDS_GRAD_IN: tl.constexpr,
    HAS_ABOVE: tl.constexpr,
    HANDS_DOWN: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Psi of a tile of rows, the gradient for the input, and the incoming plus that for the output.

    ``numbers`` are Psi and, to hand down, the output's inverse norm and the scale, ``[3, num_rows]`` in all.
    With those of the layer above and its output, the total has what that layer adds to its input too.
    Of each ``STRIDE`` places of a sequence only one, ``first``, has a gradient. The states of the others are
    not read, so they count as zero rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    is_used = is_row
    if STRIDE > 1:
        is_used = is_row & ((row // batch) % STRIDE == first)
    column = tl.arange(0, COLUMNS)[None, :]
    in_rows = (in_ptr + _rows_of(row, batch, in_s, in_b))[:, None]
    out_rows = (out_ptr + _rows_of(row, batch, out_s, out_b))[:, None]
    grad_rows = (grad_ptr + _rows_of(row, batch, grad_s, grad_b))[:, None]
    grad_in_rows = (grad_in_ptr + row.to(tl.int64) * WIDTH)[:, None]
    total_rows = (total_ptr + row.to(tl.int64) * WIDTH)[:, None]
    scale = tl.load(coefficient_ptr).to(COMPUTE) * (-0.5 * factor)
    if HAS_WEIGHTS:
        weights = tl.load(weight_ptr + _rows_of(row, batch, weight_s, weight_b), mask=is_row, other=0.0)
        scale *= weights.to(COMPUTE)
    if HAS_ABOVE:
        above_rows = (above_ptr + _rows_of(row, batch, above_s, above_b))[:, None]
        twice_above = 2 * tl.load(above_numbers_ptr + row, mask=is_used, other=0.0).to(COMPUTE)[:, None]
        inverse_above = tl.load(above_numbers_ptr + num_rows + row, mask=is_used, other=0.0).to(COMPUTE)
        scale_above = tl.load(above_numbers_ptr + 2 * num_rows + row, mask=is_used, other=0.0).to(COMPUTE)
    if WIDTH <= COLUMNS:
        mask = is_row[:, None] & (column < WIDTH)
        used = is_used[:, None] & (column < WIDTH)
        grad = tl.load(grad_rows + column, mask=mask, other=0.0)  # asked for before the norms are waited for
        u, v, inverse_in, inverse_out, psi = _whole_rows(in_rows, out_rows, column, used, COMPUTE)
        twice = (2 * psi)[:, None]
        if NEEDS_GRAD_IN:
            grad_in = (twice * u - (u - v)) * (scale * inverse_in)[:, None]
            tl.store(grad_in_rows + column, grad_in.to(grad_in_ptr.dtype.element_ty), mask=mask)
        total = grad.to(COMPUTE) + (twice * v + (u - v)) * (scale * inverse_out)[:, None]
        if HAS_ABOVE:
            above = tl.load(above_rows + column, mask=used, other=0.0).to(COMPUTE) * inverse_above[:, None]
            total += (twice_above * v - (v - above)) * (scale_above * inverse_out)[:, None]
        tl.store(total_rows + column, total.to(total_ptr.dtype.element_ty), mask=mask)
    else:
        inverse_in, inverse_out, psi = _looped_rows(in_rows, out_rows, column, is_used, WIDTH, COMPUTE)
        twice = (2 * psi)[:, None]
        for start in range(0, WIDTH, COLUMNS):
            mask = is_row[:, None] & (start + column < WIDTH)
            used = is_used[:, None] & (start + column < WIDTH)
            u = tl.load(in_rows + start + column, mask=used, other=0.0).to(COMPUTE) * inverse_in[:, None]
            v = tl.load(out_rows + start + column, mask=used, other=0.0).to(COMPUTE) * inverse_out[:, None]
            grad = tl.load(grad_rows + start + column, mask=mask, other=0.0).to(COMPUTE)
            if NEEDS_GRAD_IN:
                grad_in = (twice * u - (u - v)) * (scale * inverse_in)[:, None]
                tl.store(grad_in_rows + start + column, grad_in.to(grad_in_ptr.dtype.element_ty), mask=mask)
            total = grad + (twice * v + (u - v)) * (scale * inverse_out)[:, None]
            if HAS_ABOVE:
                above = tl.load(above_rows + start + column, mask=used, other=0.0).to(COMPUTE)
                above *= inverse_above[:, None]
                total += (twice_above * v - (v - above)) * (scale_above * inverse_out)[:, None]
            tl.store(total_rows + start + column, total.to(total_ptr.dtype.element_ty), mask=mask)
    tl.store(numbers_ptr + row, psi, mask=is_row)
    if HANDS_DOWN:
        tl.store(numbers_ptr + num_rows + row, inverse_out, mask=is_row)
        # By the row even where all rows have one: whoever reads it need not know.
        tl.store(numbers_ptr + 2 * num_rows + row, tl.broadcast_to(scale, row.shape), mask=is_row)
