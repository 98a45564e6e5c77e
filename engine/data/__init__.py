"""From video files to uint8 clips on the device.

sources.py        folders, annotation lists and single files -> paths and labels
video.py          what one file holds; manifest.py: what all of them hold; inspect.py: the summary of `mam2 index`
sampling.py       the frames, crops and mask seed of a clip: pure functions of seed, epoch and video
video_decoders.py the decoder of a file: NVDEC, DALI on the CPU, or PyAV; nvdec.py: tests whether NVDEC works here;
                  assigned_decoders.py: the decoders of a loader's videos
decoding.py       frames by PyAV; cuts.py: key frames to start at; frame_folders.py: folders of images, one per frame
dali.py, crops.py crop, resize and flip, by a DALI graph or by PyTorch; vetting.py: rejects files that crash DALI
renderer.py       one batch: decode, crop, retry clip by clip; outage.py: waits for storage that is unavailable
loader.py         all batches of all epochs, in a thread ahead of the step (prefetch.py); batch.py: its result;
                  unusable.py: unusable videos
draws.py          named random draws; encoding.py: writes videos; side_stream.py: work parallel to the step on a GPU
transcode.py      `mam2 transcode`; synthetic.py: synthetic clips; moved.py: a resumed run whose videos moved
"""
