"""Fused operators of masked video modelling: Triton on a GPU, plain PyTorch elsewhere.

    tube_mask, random_mask            which tokens are hidden: index tensors, drawn on the device
    motion_tube_mask                  tubes, hidden more often where the clip moves
    running_cell_mask                 which tokens are decoded (VideoMAE v2), and
    running_cell_subset               which of them are masked too
    gather_tubes                      the visible tokens of a uint8 or float clip, normalised
    masked_pixel_loss                 VideoMAE's and MAE's loss, straight from the clip
    masked_frame_difference_loss      the same for motion
    frame_difference                  the motion target itself
    linear_cross_entropy              classifier head and cross-entropy without the logits
    active_path                       which implementation runs for a tensor or a device
    MaskedPixelLoss, MaskedFrameDifferenceLoss, LinearCrossEntropyLoss      the losses as modules
    costs                             bytes and operations of each, from shapes

Needs torch; Triton only on a GPU.
"""

# In a checkout's root this folder can also be imported as `kernels`; transformers does so, looking for a package of
# that name. Registering the operators a second time would free those that are in use.
if __name__ == "mam2.kernels":
    from . import costs
    from .frame_difference import frame_difference
    from .gather_tubes import gather_tubes
    from .launch import active_path
    from .linear_cross_entropy import linear_cross_entropy
    from .masked_loss import masked_frame_difference_loss, masked_pixel_loss
    from .masks import TubeMask, random_mask, tube_mask
    from .modules import LinearCrossEntropyLoss, MaskedFrameDifferenceLoss, MaskedPixelLoss
    from .motion_mask import motion_tube_mask
    from .running_cell import running_cell_mask, running_cell_subset

    __all__ = [
        "LinearCrossEntropyLoss",
        "MaskedFrameDifferenceLoss",
        "MaskedPixelLoss",
        "TubeMask",
        "active_path",
        "costs",
        "frame_difference",
        "gather_tubes",
        "linear_cross_entropy",
        "masked_frame_difference_loss",
        "masked_pixel_loss",
        "motion_tube_mask",
        "random_mask",
        "running_cell_mask",
        "running_cell_subset",
        "tube_mask",
    ]
