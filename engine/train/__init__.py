"""A training run, told from the outside in.

pretrain.py, finetune.py   the task: model, data, objective, what is logged
session.py                 everything around the loop: run folder, log, resume, list of videos, unusable videos
loop.py                    batches -> steps -> log lines -> checkpoints; whatever ends it, sound weights are saved first
step.py                    one optimizer step: micro-batches, autocast, gradients, finite check, AdamW
objective.py               forward pass and losses; measures and balances the gradients of the two losses
cuda_graph.py              the same step as one CUDA graph, where that is measured to be faster
held_out.py                the pretext losses on videos that are not trained on
optimizer.py               AdamW, layer decay, learning rate
augment.py, randaugment.py fine-tuning's augmentation on the device
spikes.py                  warns where the motion loss jumps

One step: the loader returns uint8 clips [B, T, H, W, C] on the device; `gather_tubes` takes the visible tokens; the
encoder turns them into latents; the regressor predicts the latents of the masked tokens; two decoders predict their
codes and their motion; the fused losses read their targets from the clip and return gradients; AdamW updates.
"""
