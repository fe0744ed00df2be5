"""What `study`, `test`, `fit` and `prune` print on `--help`: options that people use, with examples; nothing heavy."""

TEST = """\
usage: headprobe test [OPTIONS]           every option may also stand in a YAML file: --config FILE

Score a model with and without chosen attention heads, on the same images, in one pass. [Defaults] in brackets.

which heads
  --mask-spec each:layer              heads to mask [none]; headprobe masks SPEC shows what a spec stands for
  --ablation zero,mean,linear         what masked heads become; or position, resample, optimal (docs/ablation.md) [zero]
  --calibration-file RUN  --score-heads   constants of an earlier run; also every importance score of every head
  --dry-run                           print masks, passes, time, memory and the smallest resolvable drop; run nothing

which model
  --model.name vit_base_patch16_224   timm's name, hf-hub:OWNER/MODEL, local-dir:FOLDER, or a bundled model:
                                      digits_vit, digits_swin [digits_vit]
  --model.classifier class-mean       or knn, FILE.safetensors, none: for models without one (docs/classifiers.md) [own]
  --model.weights mine.safetensors    local weights (headprobe convert makes them) [timm's pretrained ones]
  --model.pretrained false  --model.num_classes 10   random weights; classes of the classifier [the weights' own]
  --model.options.img_size 384        any argument of timm.create_model
  --model.semantics attention         mask what a head attended to alone, not its whole slot (docs/heads.md) [slot]
  --model.train_size true  --model.row_budget 64   images as in training [false]; rows a pass [48 on CPUs, 1024 on GPUs]

which images
  --data.path FOLDER                  folder, Parquet files or hub dataset; imagenet-1k streams from the hub [digits]
  --data.split validation             split [validation, else test, else the only one]
  --data.name CONFIG  --data.revision main   configuration, and branch, tag or commit of a hub dataset
  --data.image_column image  --data.label_column label   columns of images and labels [image, label]
  --data.class_map classes.json       which class is which; or sorted, natural, identity
  --data.restrict_classes false       choose among all classes of the model where the dataset has fewer [true]
  --data.max_images 5000              only so many images, an even share of every unit [all]
  --data.on_bad_image skip  --data.unit file   images that cannot be read [error]; what is read as one piece [auto]
  --data.batch_size 64  --data.num_workers 4   images a batch [32]; reading processes per device [by cores and data]
  --data.calibration split:train  --data.calibration_images 1000   which images fit, how many [half, where needed; all]

what each head is like (docs/describe_heads.md)
  --trainer.callbacks HeadAttention   distance, entropy, sinks; also HeadSimilarity, HeadSpectrum, or all three by
  --config configs/describe_heads.yaml

where, how, and what is written
  --trainer.default_root_dir DIR      results go to DIR/lightning_logs/version_N [.]
  --trainer.devices 2                 GPUs, or with --trainer.accelerator cpu --trainer.strategy ddp processes
  --trainer.precision bf16-mixed      number format of the model; bf16-true is the fastest on GPUs [32-true]
  --records  --model.per_class true   also one row per image and variant (Parquet); also classes.csv
  --resume never                      auto: continue a broken run; never: score all again; or a run's directory [auto]
  --seed_everything 1                 seed of Python, numpy and torch; masks and data do not depend on it [0]

--help-trainer lists Lightning's other --trainer options, --help-all everything. headprobe --help has the mask specs.
"""

FIT = """\
usage: headprobe fit [OPTIONS]            every option may also stand in a YAML file: --config FILE

Train a model on a small data set: from nothing, as the bundled models were made, or further without some of its heads.
[Defaults] in brackets.

  --config configs/digits_vit.yaml    the recipe of a bundled model
  --config configs/finetune_pruned.yaml   fine-tune under a mask; what headprobe prune wrote: --model.name local-dir:DIR

model and training
  --model.name vit_tiny_patch16_224   timm's name, or a bundled model [digits_vit]
  --model.weights start.safetensors   local weights to start from
  --model.pretrained false            random weights
  --model.num_classes 10              classes of the classifier
  --model.options.depth 6             any argument of timm.create_model
  --model.learning_rate 0.001         peak learning rate [0.002]
  --model.weight_decay 0.05           weight decay [0.05]
  --model.warmup 0.1                  fraction of the steps with a rising learning rate [0.1]
  --model.label_smoothing 0.1         label smoothing [0.1]
  --model.mask_spec layer:3           heads that stay zero and get no gradient [those of the weights' own training]
  --trainer.max_epochs 100            epochs

images
  --data.path FOLDER                  folder, Parquet files or hub dataset [digits]
  --data.train_split train            split to train on [train]
  --data.split test                   split to validate on [validation, else test, else the only one]
  --data.augment false                no small random shifts, turns and scalings [true]
  --data.seed 1                       seed of the order of images [0]
  --data.batch_size 64                images a batch [32]

output
  --trainer.default_root_dir DIR      model.safetensors, or of a pruned model the folder pruned, goes to
                                      DIR/lightning_logs/version_N [.]

--help-trainer lists Lightning's other --trainer options, --help-all everything.
"""

STUDY = """\
usage: headprobe study [OPTIONS]          every option may also stand in a YAML file: --config FILE

What does the multi-head do? One run with all that answers it, and a page of it: report.html beside the run's tables.
It is a test with other defaults and takes every option of headprobe test --help. [Defaults] in brackets.

what it scores, beside the whole model (docs/study.md)
  layers, indices, heads              each alone, under every ablation
  nulls                               99 draws of one random head per layer: what an index is compared with
  pairs                               of heads within layers; left out where these are more than 150
  random                              ten random orders, each at ten sizes
  scores                              every importance score, and three orders by them, each at ten sizes
  shapley                             5 to 10 whole random orders; left out where they cost more than 150 masks
  with every head's attention, similarity and frequencies

what changes it
  --skip nulls,pairs                  parts to leave out, by the names above [none]
  --mask-spec layer:3+head:5.0        masks beside the study's own [none]
  --ablation zero,linear              what masked heads become [zero,mean,linear, those that the model allows]
  --trainer.callbacks null            do not describe heads; or some of them by their names [HeadAttention,
                                      HeadSimilarity, HeadSpectrum]
  --dry-run                           print the plan with passes, time and memory; run nothing

which model, on which images
  --model.name vit_base_patch16_224   as of headprobe test [digits_vit]
  --data.path FOLDER                  as of headprobe test [digits]
  --data.max_images 1000              images: one half is scored and fits, the other judges [all; 400 of digits]
  --config configs/study_imagenet_vit_base.yaml   also configs/study_imagenet_swin_tiny.yaml

The plan is printed before it starts. Interrupt it at any time: the same command goes on where it stopped, and headprobe
status shows how far it is. headprobe report RUN makes the page again, of several runs side by side.
"""

PRUNE = """\
usage: headprobe prune --mask-spec SPEC --output DIR [OPTIONS]

Remove heads for good. The smaller model has the logits of the masked one, which is proven on it before it is written.
It is a test of the mask first, and takes every option of headprobe test --help. [Defaults] in brackets.

which heads
  --mask-spec layer:3+head:5.0        heads to remove, one mask
  --keep-top1 1.0                     instead: the largest of nested sets that is shown, with 95% confidence, to lose at
                                      most so many points of top-1
  --speed 1.3                         instead: the smallest of nested sets with which a batch of 64 is so much faster
  --mask-spec grow:random:0           the nested sets of these two, or grow:calibration:SCORE
                                      [grow:calibration:residual_variance_after_projection]

what stands for them
  --ablation linear                   zero, mean, optimal or linear, folded into the weights that are left [zero]
  --refit                             fit linear layer by layer, each in the model that is pruned up to it
  --calibration-file RUN              constants of an earlier run

which model, on which images (zero with a mask needs none)
  --model.name deit_tiny_patch16_224  as of headprobe test; local-dir:DIR prunes a pruned model again
  --data.path FOLDER  --data.calibration half   one half fits, the other judges

what is written
  --output DIR                        a new folder: model.safetensors, config.json, README.md, perhaps curve.csv
  --pairs 20                          pairs of timings that measure latency, before and after [20]

Load it with headprobe.load_pruned(DIR), or as --model.name local-dir:DIR (docs/prune.md).
"""

SCREENS = {"study": STUDY, "test": TEST, "fit": FIT, "prune": PRUNE}
"""The text of each command's `--help`."""
