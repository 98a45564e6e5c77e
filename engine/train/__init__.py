"""A training run, from the outside to the inside.

pretrain.py, finetune.py   the task: model, extras of a batch, work after a step; description.py: what is logged of it;
                           initial_weights.py: weights to start from
finetune_setup.py          classes, initial encoder and validation videos; finetune_tasks.py, finetune_targets.py:
                           targets and measures of each head; validation_model.py: the model that is validated
session.py                 everything around the loop: run folder, log, resume, manifest, loaders, unusable videos
loop.py                    batches -> steps -> log lines -> checkpoints; saves valid weights, whatever ends the run
step_log.py                the numbers of the steps on their way to the log; spikes.py: jumps of the motion loss;
                           collapse.py: equal features of the teacher; step_times.py: the time of each phase
step.py                    one optimizer step: micro-batches, autocast, gradients, finite check, update;
                           pass_size.py: the largest micro-batch that fits
classifier_step.py         the same for fine-tuning
objective.py               forward pass and losses; measures and balances the gradients of the two losses
cuda_graph.py              the same step as one CUDA graph, unless that is measured to be slower
graph_parts.py             the same step of several processes in two parts, between which gradients are exchanged
held_out.py                the pretext losses on held-out videos
optimizer.py, muon.py      AdamW or Muon, layer decay, learning rate
augment.py, randaugment.py fine-tuning's augmentation on the device

One step: the loader returns uint8 clips [B, T, H, W, C] on the device; `gather_tubes` selects the visible tokens; the
encoder turns them into latents; the regressor predicts the latents of the masked tokens; two decoders predict their
codes and their motion; the fused losses read their targets from the clip and return gradients; the optimizer updates.
"""
