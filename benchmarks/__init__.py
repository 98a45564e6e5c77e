"""Benchmarks, studies and checks on a GPU. Each module says in its first line what it measures and how it is started.

Operators         bench_OPERATOR.py: one operator against the code that its users would write; operators.py: their
                  registry, check.py: checks before timing, clips.py: inputs, masked_losses.py: what two of them share;
                  accuracy.py: errors and memory; test_operators.py: `make bench`
Correctness       correctness.py: kernels against float64, on the inputs of cases.py; sanitize.py: compute-sanitizer
A training step   bench_step.py, with step_plan.py (variants), step_sizes.py (configs), step_parts.py (parts alone),
                  step_kernels.py (kernels by time), first_step.py (compilation); peers: hugging_face.py,
                  official_videomae.py; test_step.py: `make bench`
Loading           bench_loader.py, with loader_settings.py and recorded_clips.py; Python's lock:
                  lock_waits.py, decoding_gil.py; test_loader.py: `make bench`
Codes             bench_tokenizer.py: their time; tokenizer_choices.py, cluster_codes.py: kinds of codes
A GPU's command   gpu.py: `make gpu`, its sections.py, real_run.py, counters.py (Nsight Compute); tune.py: launch table
Predictions       predict.py, predict_loader.py, predict_steps.py, from h200.py; plan_memory.py: activations of plans
Studies           convergence.py with trials/: MAM2 against VideoMAE; defaults.py, motion_floor.py, early_stage.py,
                  probe_seeds.py: recipes' values on real clips
Tools             timing.py, machine.py, processes.py, launches.py, report.py; conftest.py: pytest-benchmark's tables
results/          measured results by machine
"""
