"""The convergence study of `benchmarks.convergence`: many short trainings of MAM2 and VideoMAE, compared.

settings.py    sizes, methods, optimizers, ablations; jobs.py: the trainings of a study, the important ones first
prepared.py    a data set as arrays, decoded and tokenized once; clips.py: harder synthetic clips; real.py: real clips
worker.py      a process of the study; trial.py: one training: pre-training, probe, fine-tuning
selection.py   the trainings that belong together; results.py: their results; intervals.py: 95 % intervals; reach.py:
               what one method needs to reach the best accuracy of another
report.py      docs/convergence.md: real_report.py: its tables of real clips; pictures.py: its pictures
"""
