"""Deliberate mistakes in the kernels and in the PyTorch path, each with the tests that must notice it.

`old` occurs exactly once in its file, so that a mutant that no longer applies is an error.
"""

from typing import NamedTuple

INTERPRETER, LIMITS = "kernels_in_interpreter.py", "limits_in_interpreter.py"
"""Tests of the Triton kernels; the other files test the PyTorch path."""


class Mutant(NamedTuple):
    mistake: str
    file: str
    """In kernels/."""
    old: str
    new: str
    tests: str
    """File in tests/kernels/."""
    select: str
    """Names of test functions there, at least one of which must fail: pytest's -k."""


_MISTAKES = {
    (INTERPRETER, "shared_case and loss and 3x4x4"): [
        (
            "eps inside the root",
            "cube.py",
            "inverse = 1.0 / (tl.sqrt(variance) + EPS * UNIT)",
            "inverse = 1.0 / tl.sqrt(variance + EPS * UNIT)",
        ),
        (
            "eps in units of [0,1] where the cube is in bytes",
            "cube.py",
            "(tl.sqrt(variance) + EPS * UNIT)",
            "(tl.sqrt(variance) + EPS)",
        ),
        (
            "biased variance of bytes",
            "cube.py",
            "scatter.to(DTYPE) / (COUNT * (COUNT - 1))",
            "scatter.to(DTYPE) / (COUNT * COUNT)",
        ),
        (
            "the row's stride taken for the frame's",
            "cube.py",
            "offset = frame * stride_t + row * stride_h",
            "offset = row * stride_h",
        ),
        (
            "planes in the place of runs",
            "cube.py",
            "values[v % CHANNELS * PIXELS + v // CHANNELS]",
            "values[v]",
        ),
        (
            "runs that overlap",
            "cube.py",
            "(PIXELS * CHANNELS) + run * RUN + tl",
            "(PIXELS * CHANNELS) + run * (RUN - 1) + tl",
        ),
        (
            "predictions of every token read in the order of the mask",
            "masked_error.py",
            "        pred_row = token.to(tl.int64)\n",
            "",
        ),
        (
            "eps of a patch's variance not squared with its unit",
            "cube.py",
            "tl.sqrt(variance + EPS * UNIT * UNIT)",
            "tl.sqrt(variance + EPS * UNIT)",
        ),
        ("the clip's last frame has a next one", "targets.py", "(slot < slots - 1)", "(slot < slots)"),
        (
            "values without a target in the error",
            "masked_error.py",
            "residual = tl.where(exists, predictions[run].to(DTYPE) - target[run], 0.0)",
            "residual = predictions[run].to(DTYPE) - target[run]",
        ),
        (
            "half the gradient",
            "masked_error.py",
            "slope = 2.0 * factor",
            "slope = factor",
        ),
        (
            "the mean taken from differences to the first frame too",
            "targets.py",
            "goal -= tl.where(frame > 0, 0.0, means[",
            "goal -= tl.where(frame > 9, 0.0, means[",
        ),
    ],
    (INTERPRETER, "shared_case and loss and inner"): [
        (
            "biased variance of a float clip",
            "cube.py",
            "group_sum(squares, group, GROUPS) / (COUNT - 1)",
            "group_sum(squares, group, GROUPS) / COUNT",
        ),
        (
            "no gradient written where nothing exists",
            "masked_error.py",
            "stored = strip < FRAMES * HEIGHT * WIDTH // PIXELS\n",
            "stored = exists\n",
        ),
    ],
    (INTERPRETER, "shared_case and loss and 16x16"): [
        (
            "values of one channel taken for another's",
            "cube.py",
            "values[place % PIXELS * CHANNELS + place // PIXELS]",
            "values[place]",
        ),
        ("strips of a row one pixel apart", "cube.py", "column = strip % STRIPS * PIXELS", "column = strip % STRIPS"),
        (
            "every plane with the first channel's statistics",
            "targets.py",
            "goal *= inverses[block * GROUPS // len(cube)]",
            "goal *= inverses[0]",
        ),
    ],
    (LIMITS, "large_bright_patches"): [
        ("squared sum of bytes in 32 bits", "cube.py", "wide = total.to(tl.int64)", "wide = total"),
        (
            "motion energy of a large patch in 32 bits",
            "motion_mask.py",
            "WHOLE: tl.constexpr = tl.int64 if",
            "WHOLE: tl.constexpr = tl.int32 if",
        ),
    ],
    (LIMITS, "test_offsets_past_32_bits"): [
        (
            "64-bit offsets with the wrong stride",
            "cube.py",
            " + row.to(tl.int64) * stride_h +",
            " + row.to(tl.int64) * stride_t +",
        ),
        (
            "64-bit offsets of channels by the pixel's stride",
            "cube.py",
            "block // OF_PLANE, tl.int64) * stride_c",
            "block // OF_PLANE, tl.int64) * stride_w",
        ),
    ],
    (LIMITS, "reach_past_32_bits"): [
        (
            "clips 32-bit offsets apart",
            "cube.py",
            "clip = (place // count).to(tl.int64)",
            "clip = place // count",
        ),
        ("slots 32-bit offsets apart", "cube.py", "base = slot.to(tl.int64) * TUBELET", "base = slot * TUBELET"),
        ("no cube taken to be wide", "cube.py", '"WIDE": span >= 2**31', '"WIDE": False'),
    ],
    (INTERPRETER, "test_a_token_out_of_range"): [
        (
            "a token past the last one read",
            "cube.py",
            "inside = (token >= 0) & (token < slots * rows * columns)",
            "inside = (token >= 0) & (token <= slots * rows * columns)",
        ),
    ],
    (INTERPRETER, "gradient_of_a_token_out_of_range"): [
        (
            "the gradient of a token out of range left as the memory was",
            "masked_error.py",
            "            if EVERY_TOKEN:  # a token",
            "            if True:  # a token",
        ),
        (
            "a factor for a token out of range in predictions of every token",
            "masked_error.py",
            "            slope *= tl.load(fits_ptr + clip)\n",
            "            slope *= 1.0\n",
        ),
    ],
    (INTERPRETER, "test_a_target_out_of_range"): [
        (
            "a target out of range has the gradient of no target",
            "softmax_gradient.py",
            'tl.where(exists, upstream, float("nan"))',
            "tl.where(exists, upstream, upstream)",
        ),
    ],
    (LIMITS, "minus_infinity"): [
        (
            "the difference of two infinities",
            "softmax_gradient.py",
            'return tl.where(largest == float("-inf"), 0.0, largest)',
            "return largest",
        ),
    ],
    (INTERPRETER, "byte_at_its_channel"): [
        (
            "a product and a shift, which a GPU rounds once",
            "gather_tubes.py",
            '(part * tl.where(inside, factor, float("nan")),)',
            "((part + AFFINE[0][block]) * factor - AFFINE[0][block] * factor,)",
        ),
    ],
    (INTERPRETER, "one_color"): [
        (
            "the mean of bytes by an approximate quotient",
            "cube.py",
            "mean = (total // COUNT).to(DTYPE) + (total % COUNT).to(DTYPE) / COUNT",
            "mean = total.to(DTYPE) / COUNT",
        ),
        (
            "PyTorch path: the sum of bytes after a division",
            "reference.py",
            "    pixels = raw.to(dtype, copy=True)\n",
            "    pixels = raw.to(dtype, copy=True).div_(255)\n",
        ),
    ],
    (INTERPRETER, "shared_case and gather_tubes and normalized and not 16x16"): [
        (
            "the mean in units of [0,1] where the clip is in bytes",
            "cube.py",
            "tuple(m * one for m in mean)",
            "tuple(mean)",
        ),
    ],
    (INTERPRETER, "shared_case and scale_gradient and float16"): [
        (
            "a factor for every block instead of every row",
            "scale_gradient.py",
            "scale = tl.load(scale_ptr + row)",
            "scale = tl.load(scale_ptr + row - row)",
        ),
    ],
    (INTERPRETER, "upstream_scales_the_gradient_in_place"): [
        (
            "rows of factor 1 scaled, the others not",
            "scale_gradient.py",
            "end = tl.where(scale == 1, 0, length)",
            "end = tl.where(scale == 1, length, 0)",
        ),
        (
            "a whole gradient left as it is at every factor",
            "scale_gradient.py",
            "stop = tl.where(scale == 1, 0, total)",
            "stop = tl.where(scale == 1, 0, 0)",
        ),
        (
            "programs that skip each other's blocks",
            "scale_gradient.py",
            "range(tl.program_id(0), stop, tl.num_programs(0))",
            "range(tl.program_id(0), tl.minimum(stop, tl.num_programs(0)), tl.num_programs(0))",
        ),
    ],
    ("test_upstream.py", "kept_graph"): [
        (
            "a gradient overwritten that another backward pass needs",
            "scale_gradient.py",
            "if torch._C._autograd._get_current_graph_task_keep_graph():",
            "if False:",
        ),
    ],
    ("test_upstream.py", "learns"): [
        (
            "weights that learn take tokens of weight 0 for tokens without error",
            "reference.py",
            "if scales.dim() and not needs[1]:",
            "if scales.dim():",
        ),
    ],
    ("test_upstream.py", "float16"): [
        (
            "a float16 gradient with the divisor of the mean",
            "masked_loss.py",
            "if pred_dtype == torch.float16:",
            "if False:",
        ),
    ],
    (INTERPRETER, "masked_head_in_chunks"): [
        (
            "every chunk takes the first tokens",
            "linear_masked_loss.py",
            "launch_masked_loss(*whole, chunk.start, chunk.stop)",
            "launch_masked_loss(*whole, 0, chunk.stop - chunk.start)",
        ),
    ],
    ("test_linear_masked_loss.py", "two_steps"): [
        (
            "factors of the first clips for all chunks",
            "linear_masked_loss.py",
            "own = factors[clips] if",
            "own = factors[: len(masked[clips])] if",
        ),
        (
            "the bias's gradient of a row instead of their sum",
            "products.py",
            "total += rows.sum(dim=0, dtype=total.dtype)",
            "total += rows[0]",
        ),
    ],
    (LIMITS, "largest_logit"): [
        ("powers of 2 instead of e", "softmax_gradient.py", "tl.exp2(difference * LOG2_E)", "tl.exp2(difference)"),
        (
            "exponentials of another maximum summed",
            "softmax_gradient.py",
            "sum_exp = sum_exp * exponential(largest - above(larger)) + ",
            "sum_exp = sum_exp + ",
        ),
    ],
    (INTERPRETER, "shared_case and V1000"): [
        (
            "smoothing left out of the gradient",
            "softmax_gradient.py",
            "shift = SMOOTHING * upstream / codes",
            "shift = 0.0 * upstream",
        ),
    ],
    (INTERPRETER, "shared_case and linear_cross_entropy and none"): [
        (
            "the upstream weights of rows dropped",
            "softmax_gradient.py",
            "        upstream = tl.load(upstream_ptr + row * UPSTREAM_STRIDE)\n",
            "        upstream = 1.0\n",
        ),
    ],
    (INTERPRETER, "shared_case and V5"): [
        (
            "an ignored row has a gradient",
            "softmax_gradient.py",
            'upstream = tl.where(counted, tl.where(exists, upstream, float("nan")), 0.0).to(DTYPE)',
            "upstream = tl.where(counted, upstream, upstream).to(DTYPE)",
        ),
    ],
    (INTERPRETER, "shared_case and tube_mask and 2x5"): [
        ("another word of the generator", "masks.py", "word, _, _, _ = tl.philox(", "_, word, _, _ = tl.philox("),
    ],
    (INTERPRETER, "shared_case and masked_subset and cell"): [
        ("cells that do not turn from slot to slot", "masked_subset.py", "((place - slot - step", "((place - step"),
        ("cells that do not turn from step to step", "masked_subset.py", "slot - step - sample", "slot - sample"),
        ("cells that do not turn from clip to clip", "masked_subset.py", "step - sample) & 3", "step) & 3"),
        (
            "patches of a cell row by row instead of clockwise",
            "masked_subset.py",
            "column % 2, 3 - column % 2)",
            "column % 2, 2 + column % 2)",
        ),
    ],
    (INTERPRETER, "shared_case and masked_subset and not cell"): [
        ("keys of entries instead of tokens", "masked_subset.py", "random_keys(number, ", "random_keys(entry, "),
        ("one masked token too few drawn", "masked_subset.py", "entry, count)", "entry, count - 1)"),
    ],
    (LIMITS, "equal_keys"): [
        (
            "of equal keys the larger token drawn",
            "masked_subset.py",
            "key * 8388608 + entry,",
            "key * 8388608 - entry,",
        ),
        (
            "of equal keys the larger position hidden",
            "masks.py",
            "key * 8388608 + position,",
            "key * 8388608 - position,",
        ),
    ],
    (INTERPRETER, "shared_case and motion_tube_mask"): [
        (
            "motion weights from the energy of the last slot",
            "masks.py",
            "            energy += tl.load(energies + position",
            "            energy = tl.load(energies + position",
        ),
    ],
    (INTERPRETER, "shared_case and motion_energy and 3x4x4"): [
        (
            "motion energy without the slots' last frames",
            "motion_mask.py",
            "has_target(frame, slot, slots, 1, TUBELET)",
            "has_target(frame, slot, slots, 2, TUBELET)",
        ),
    ],
    ("test_masked_loss.py", "test_channel_is_videomae"): [
        (
            "PyTorch path: eps inside the root",
            "reference.py",
            "return variance.sqrt_().add_(eps * unit)",
            "return variance.add_(eps * unit).sqrt_()",
        ),
        (
            "PyTorch path: biased variance",
            "reference.py",
            ".div_(centered.shape[1] // groups - 1)",
            ".div_(centered.shape[1] // groups)",
        ),
        (
            "PyTorch path: half the gradient",
            "reference.py",
            "residual.mul_(2 * (",
            "residual.mul_(1 * (",
        ),
    ],
    ("test_gather_tubes.py", "test_equals_einops_on_the_whole_clip"): [
        (
            "PyTorch path: tokens of the second clip taken from the first",
            "token_cubes.py",
            "places = np.arange(len(index))[:, None], *np",
            "places = np.zeros(len(index), int)[:, None], *np",
        ),
        (
            "PyTorch path: the mean in units of [0,1] where the clip is in bytes",
            "reference.py",
            "device=device).mul_(unit).repeat(1, pixels)",
            "device=device).repeat(1, pixels)",
        ),
    ],
    ("test_frame_difference.py", "test_equals_standardizing_and_subtracting"): [
        (
            "PyTorch path: the next frame of the clip's last slot from its first one",
            "reference.py",
            " + (following % tubelet).flatten()",
            "",
        ),
    ],
    ("test_frame_difference.py", "test_a_mask_picks_its_rows"): [
        (
            "PyTorch path: the next frame of a few tokens from the first row and column",
            "reference.py",
            "following * slot + index % slot, (1",
            "following * slot, (1",
        ),
    ],
    ("test_motion_mask.py", "test_energies_are_sums_of_squared_changes"): [
        (
            "PyTorch path: bytes that wrap where a pixel gets darker",
            "reference_masks.py",
            "earlier, later = pixels[:, :, :-1], pixels[:, :, 1:]",
            "earlier, later = pixels[:, :, :-1] * 0, (video[:, :, 1:] - video[:, :, :-1]).to(inside)",
        ),
        (
            "PyTorch path: the last frame keeps what was in memory",
            "reference_masks.py",
            "change[:, :, later.shape[2] :] = 0",
            "change[:, :, later.shape[2] :] = 1",
        ),
    ],
    ("test_motion_mask.py", "test_energies_computed_slot_by_slot_are_equal"): [
        (
            "PyTorch path: the last frame of some slots compared with none",
            "reference_masks.py",
            "video[clips, :, first : stop + 1]",
            "video[clips, :, first:stop]",
        ),
    ],
    ("test_masks.py", "test_masks_on_a_cpu_are_those_of_the_reference"): [
        (
            "masks on a CPU: the last hidden position left out",
            "host_masks.py",
            "hidden = rank <= t",
            "hidden = rank < t",
        ),
    ],
    ("test_masked_subset.py", "test_a_subset_is_the_recorded_one"): [
        (
            "subsets on a CPU: cells that do not turn from slot to slot",
            "host_masks.py",
            "3 - column % 2) - slot)",
            "3 - column % 2) - slot * 0)",
        ),
        (
            "subsets on a CPU: cells that do not turn from step to step",
            "host_masks.py",
            " - number - clips) & 3",
            " - clips) & 3",
        ),
    ],
    ("test_masked_subset.py", "test_subsets_on_a_cpu_are_those_of_the_reference"): [
        (
            "PyTorch path: cells that do not turn from slot to slot",
            "reference_masks.py",
            "((place - slot - step",
            "((place - step",
        ),
        ("PyTorch path: the largest ranks drawn", "reference_masks.py", "largest=False", "largest=True"),
    ],
    ("test_masks.py", "test_only_a_clip_with_a_number_twice_is_marked"): [
        (
            "numbers out of range taken for the last token",
            "masks.py",
            "torch.where(inside, index, tokens), True)",
            "torch.where(inside, index, tokens - 1), True)",
        ),
        (
            "numbers out of range counted as repeated",
            "masks.py",
            "< inside.sum(dim=1, keepdim=True)",
            "< index.shape[1]",
        ),
    ],
    ("test_masks.py", "test_masks_are_those_recorded"): [
        ("masks on a CPU: the high word of the sample lost", "host_masks.py", "sample >> 32", "sample * 0"),
    ],
    ("test_masks.py", "test_philox_matches_the_published_vectors"): [
        (
            "masks on a CPU: words that do not change places",
            "host_masks.py",
            "reshape(*shape, 2)[::-1]",
            "reshape(*shape, 2)",
        ),
        ("masks on a CPU: nine rounds of the generator", "host_masks.py", "PHILOX_ROUNDS = 10", "PHILOX_ROUNDS = 9"),
    ],
    ("test_linear_cross_entropy.py", "test_equals_cross_entropy_in_float64"): [
        (
            "PyTorch path: smoothing not taken from the target",
            "reference.py",
            "(label_smoothing - 1) * factor",
            "-factor",
        ),
        (
            "the weight's gradient of the last chunk only",
            "products.py",
            "total.addmm_(left, right)",
            "total.addmm_(left, right, beta=0)",
        ),
        (
            "upstream weights of the first chunk for all",
            "linear_cross_entropy.py",
            "weights = upstream[chunk] if",
            "weights = upstream[: len(logits)] if",
        ),
    ],
    ("test_linear_cross_entropy.py", "test_ignored_rows"): [
        (
            "PyTorch path: an ignored row has a gradient",
            "reference.py",
            "torch.where(ignored, 0.0, factors)",
            "torch.where(ignored, factors, factors)",
        ),
    ],
    ("test_upstream.py", "every_token"): [
        (
            "upstream factors of masked tokens given to the first tokens",
            "masked_error.py",
            "scatter(1, index, upstream)",
            "scatter(1, torch.arange(masked.shape[1]).expand_as(masked), upstream)",
        ),
    ],
    ("test_masked_loss.py", "test_frame_difference_loss_is_mse_against_the_target"): [
        (
            "values that do not exist in the mean's divisor",
            "masked_loss.py",
            "existing = values - last_slot.to(dtype) * (values // goal.patch_size[0])",
            "existing = values - last_slot.to(dtype) * 0",
        ),
    ],
    ("test_token_weights.py", "test_weights_multiply_errors"): [
        (
            "weights left out of the mean's divisor",
            "masked_loss.py",
            "existing = weight * existing",
            "existing = weight**0 * existing",
        ),
    ],
    ("test_running_cell.py", "test_every_clip_is_one_of_the_four_phases"): [
        (
            "the running cell turns the other way",
            "running_cell.py",
            "turn = slot[:, None, None] + 1 + ",
            "turn = -slot[:, None, None] + 1 + ",
        ),
    ],
}
"""(file in tests/kernels/, selection) → (mistake, file in kernels/, old, new)."""

MUTANTS = [Mutant(*mistake, tests, select) for (tests, select), mistakes in _MISTAKES.items() for mistake in mistakes]
