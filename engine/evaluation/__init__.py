"""Evaluation of encoders: probes, classification, predictions as numbers and pictures.

features.py, feature_files.py             frozen features, cached by the hash of the encoder
pools.py                                  the groups of tokens over which features are averaged
embedding.py, embedding_files.py          features of videos, and of windows over long ones, as files
probing.py, probe_run.py                  all probes: linear_probe.py, attentive.py, knn.py
components.py                             principal components of large features, and their probe
segments.py                               probes of temporal segments from windows
neighbors.py                              without training: retrieval.py; mask_propagation.py, propagation.py,
                                          mask_clips.py
classification.py, views.py, accuracy.py  a classifier on several views per video
prediction.py, prediction_files.py        classes of videos without labels, as files and pictures
pretext.py, scores.py                     codes and motion predicted on unseen clips, and how well
visualize.py, visualize_page.py           predictions on a page; the pictures: pixel_predictions.py, pixel_pictures.py,
                                          motion_pictures.py, feature_pictures.py, regressor_attention.py
report.py, plots.py                       the demo's page; curves of runs
"""
