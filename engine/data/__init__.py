"""From video files to uint8 clips on the device.

sources.py          folders (folders.py), annotation lists (lists.py), tar files (tar_shards.py) and single files ->
                    paths and labels; label_texts.py: other labels than one class; sets.py: several data sets
storage.py          opens local files, members of tar files and addresses; outage.py: waits for unavailable storage
video.py            what one file holds; manifest.py: what all of them hold; moved.py: a resumed run whose videos moved
indexing.py         `mam2 index`; inspect.py: its summary; transcode.py: `mam2 transcode`
sample_order.py     which sample of which data set is next; sampling.py: its frames and crops; draws.py: random streams
video_decoders.py   the decoder of a file: NVDEC, DALI on the CPU, or PyAV; nvdec.py: tests whether NVDEC works here
                    assigned_decoders.py: the decoders of a loader's videos; decoder_share.py: how many of them
                    NVDEC decodes, and how many PyAV at the same time
decoding.py         frames by PyAV; decode_process.py: in processes of their own; cuts.py: key frames to start at;
                    frame_folders.py: folders of images, one per frame
arrays.py           frames of NumPy arrays; values.py: their values as pixels
dali.py, crops.py   crop, resize and flip, by a DALI graph or by PyTorch; vetting.py: rejects files that crash DALI
renderer.py         one batch: decode, crop, retry clip by clip
loader.py           all batches of all epochs, in a thread ahead of the step (prefetch.py); batch_plan.py: their
                    samples; batch.py: its result; unusable.py: unusable videos
windows.py          windows over a whole video in one pass
side_stream.py      work parallel to the step on a GPU
synthetic.py        synthetic clips; encoding.py: writes videos
"""
