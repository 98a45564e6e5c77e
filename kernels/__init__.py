"""Fused operators of masked video modeling: Triton on a GPU, plain PyTorch elsewhere.

    tube_mask, random_mask            draw which tokens are masked, as index tensors on the device
    motion_tube_mask                  draws tubes; moving positions are masked more often
    running_cell_mask                 draws which tokens are decoded (VideoMAE v2)
    running_cell_subset               picks the decoded tokens that are also masked
    gather_tubes                      gathers and normalizes the visible tokens of a uint8 or float clip
    masked_pixel_loss                 VideoMAE's and MAE's loss, computed directly from the clip
    masked_frame_difference_loss      the same for motion
    frame_difference                  the motion target itself
    linear_masked_loss                a decoder's last layer and a masked loss without storing the predictions
    linear_cross_entropy              classifier head and cross-entropy without storing the logits
    active_path                       which implementation runs for a tensor or a device
    MaskedPixelLoss, MaskedFrameDifferenceLoss, LinearCrossEntropyLoss, LinearMaskedLoss      the losses as modules
    costs                             bytes and operations of each operator, from shapes

The package needs torch; it needs Triton only on a GPU.
"""

# transformers looks for a package named `kernels` and, started in a checkout's root, imports this folder under that
# name. Registering the operators a second time would free the ones in use.
if __name__ == "mam2.kernels":
    from . import costs
    from .frame_difference import frame_difference
    from .gather_tubes import gather_tubes
    from .launch import active_path
    from .linear_cross_entropy import linear_cross_entropy
    from .linear_masked_loss import linear_masked_loss
    from .masked_loss import masked_frame_difference_loss, masked_pixel_loss
    from .masks import TubeMask, random_mask, tube_mask
    from .modules import LinearCrossEntropyLoss, LinearMaskedLoss, MaskedFrameDifferenceLoss, MaskedPixelLoss
    from .motion_mask import motion_tube_mask
    from .running_cell import running_cell_mask, running_cell_subset

    __all__ = [
        "LinearCrossEntropyLoss",
        "LinearMaskedLoss",
        "MaskedFrameDifferenceLoss",
        "MaskedPixelLoss",
        "TubeMask",
        "active_path",
        "costs",
        "frame_difference",
        "gather_tubes",
        "linear_cross_entropy",
        "linear_masked_loss",
        "masked_frame_difference_loss",
        "masked_pixel_loss",
        "motion_tube_mask",
        "random_mask",
        "running_cell_mask",
        "running_cell_subset",
        "tube_mask",
    ]
