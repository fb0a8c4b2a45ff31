"""Every key that the embedded runner reads, with its default.

One comment a key: meaning, unit, legal values. Keys in PySlowFast's nodes (TRAIN, TEST, DATA, MODEL, …) have
PySlowFast's names and meanings, so that its YAML files can be read. The plugin's own keys live in top-level nodes of
their own (NETWORK, INIT, CORPUS, DISTILL, ACTION, RUNNER, PREDICT), so that dropping those nodes leaves a YAML that a
plain PySlowFast reads.
"""

from __future__ import annotations

from distinit_plugin.config.node import CfgNode

_C = CfgNode()

# ---------------------------------------------------------------------------------------------- PySlowFast's nodes
_C.OUTPUT_DIR = "./runs/default"  # folder for checkpoints, logs and results; made if missing
_C.RNG_SEED = 0  # seed of weights, sampling and augmentation; integer ≥ 0
_C.NUM_GPUS = 0  # accelerators of each machine, one process each; 0: CPU (RUNNER.CPU_RANKS processes)
_C.NUM_SHARDS = 1  # machines in the job; with several, RUNNER.INIT_METHOD says where they meet
_C.SHARD_ID = 0  # number of this machine, 0 … NUM_SHARDS − 1
_C.LOG_PERIOD = 10  # optimizer steps between two log lines; ≥ 1
_C.LOG_MODEL_INFO = True  # print parameters and terms at start

_C.TRAIN = CfgNode()
_C.TRAIN.ENABLE = True  # train
_C.TRAIN.DATASET = "kinetics"  # {train,val,test}.csv under DATA.PATH_TO_DATA_DIR, or CORPUS; "ava": with DETECTION
_C.TRAIN.BATCH_SIZE = 32  # clips per optimizer step on this shard (all its GPUs together)
_C.TRAIN.EVAL_PERIOD = 1  # epochs between validations; the last epoch is always validated
_C.TRAIN.CHECKPOINT_PERIOD = 1  # epochs between checkpoints; the last epoch is always saved
_C.TRAIN.AUTO_RESUME = True  # continue from the newest checkpoint in OUTPUT_DIR
_C.TRAIN.CHECKPOINT_FILE_PATH = ""  # weights to start from (ours or PySlowFast's layout)
_C.TRAIN.CHECKPOINT_EPOCH_RESET = True  # True: only the weights are taken; False: epoch and optimizer too
_C.TRAIN.MIXED_PRECISION = False  # PySlowFast's fp16 flag: True means RUNNER.PRECISION fp16

_C.TEST = CfgNode()
_C.TEST.ENABLE = True  # test after training (or alone, with TRAIN.ENABLE False)
_C.TEST.DATASET = "kinetics"  # as TRAIN.DATASET
_C.TEST.BATCH_SIZE = 8  # clips per forward on this shard
_C.TEST.CHECKPOINT_FILE_PATH = ""  # weights to test; empty: the newest checkpoint of OUTPUT_DIR
_C.TEST.NUM_ENSEMBLE_VIEWS = 10  # clips per video, uniformly spaced and reaching the end
_C.TEST.NUM_SPATIAL_CROPS = 1  # 1: centre; 3: along the longer side

_C.DATA = CfgNode()
_C.DATA.PATH_TO_DATA_DIR = ""  # folder of {train,val,test}.csv when CORPUS names no corpora
_C.DATA.PATH_PREFIX = ""  # put before every path of those lists
_C.DATA.PATH_LABEL_SEPARATOR = " "  # between path and label; the last one in a row counts
_C.DATA.NUM_FRAMES = 8  # frames of the student's clip
_C.DATA.SAMPLING_RATE = 1  # distance between those frames, in frames
_C.DATA.MEAN = [0.45, 0.45, 0.45]  # per-channel mean, RGB in [0, 1]
_C.DATA.STD = [0.225, 0.225, 0.225]  # per-channel standard deviation
_C.DATA.TRAIN_JITTER_SCALES = [128, 160]  # range of the short side from which training crops are cut, pixels
_C.DATA.TRAIN_CROP_SIZE = 112  # training crop, pixels
_C.DATA.TEST_CROP_SIZE = 112  # test crop, pixels
_C.DATA.RANDOM_FLIP = True  # mirror half of the training clips; switch off for left/right labels and digits
_C.DATA.TRAIN_PCA_EIGVAL = [0.225, 0.224, 0.229]  # AVA.TRAIN_USE_COLOR_AUGMENTATION: sizes of three changes of colour
_C.DATA.TRAIN_PCA_EIGVEC = [  # and their directions: a row for each of red, green and blue, a column for each change
    [-0.5675, 0.7192, 0.4009],
    [-0.5808, -0.0045, -0.814],
    [-0.5836, -0.6948, 0.4203],
]

_C.DATA_LOADER = CfgNode()
_C.DATA_LOADER.NUM_WORKERS = 2  # decoding processes per rank; 0: in the main process
_C.DATA_LOADER.PIN_MEMORY = True  # page-locked batches; only used with a GPU

_C.AVA = CfgNode()  # keyframes with boxes, in AVA's files (with DETECTION.ENABLE); lists are files of ANNOTATION_DIR
_C.AVA.ANNOTATION_DIR = ""  # folder of the csv files and the label map
_C.AVA.FRAME_DIR = ""  # folder of extracted frames (see KEYFRAMES for videos themselves)
_C.AVA.FRAME_LIST_DIR = ""  # folder of TRAIN_LISTS and TEST_LISTS; empty: a video's frames are FRAME_DIR/VIDEO/*.jpg
_C.AVA.TRAIN_LISTS = ["train.csv"]  # which frames there are of each training video, in order
_C.AVA.TEST_LISTS = ["val.csv"]  # the same for validation and test
_C.AVA.TRAIN_GT_BOX_LISTS = ["ava_train_v2.2.csv"]  # training: annotated boxes
_C.AVA.TRAIN_PREDICT_BOX_LISTS = []  # training: boxes of a detector that are added, scores in the 8th column
_C.AVA.TEST_PREDICT_BOX_LISTS = ["ava_val_predicted_boxes.csv"]  # validation, test: the boxes that are classified
_C.AVA.DETECTION_SCORE_THRESH = 0.9  # predicted boxes below this score are left out
_C.AVA.TRAIN_USE_COLOR_AUGMENTATION = False  # training: change the colours of clips at random
_C.AVA.TRAIN_PCA_JITTER_ONLY = True  # only along DATA.TRAIN_PCA_EIGVEC; False: brightness, contrast, saturation too
_C.AVA.TEST_FORCE_FLIP = False  # validation, test: mirror all pictures
_C.AVA.FULL_TEST_ON_VAL = False  # validation in training: all keyframes; False: those at seconds divisible by 4
_C.AVA.GROUNDTRUTH_FILE = "ava_val_v2.2.csv"  # validation, test: annotated boxes
_C.AVA.LABEL_MAP_FILE = "ava_action_list_v2.2_for_activitynet_2019.pbtxt"  # names of the actions that are evaluated
_C.AVA.EXCLUSION_FILE = "ava_val_excluded_timestamps_v2.2.csv"  # keyframes that are not evaluated; empty: none

_C.MODEL = CfgNode()
_C.MODEL.MODEL_NAME = "R2Plus1D"  # a registered network, "torchvision/NAME", "pytorchvideo/NAME", "slowfast/NAME"
_C.MODEL.NUM_CLASSES = 400  # classes of the labelled task; no classifier is built where no term reads it
_C.MODEL.DROPOUT_RATE = 0.0  # dropped fraction before the classifier, [0, 1)
_C.MODEL.FROZEN_BN = False  # batch normalisation keeps the statistics of the weights that the training starts from

_C.RESNET = CfgNode()
_C.RESNET.DEPTH = 18  # layers of Res3D, R2Plus1D, Res2D: 10, 18, 34, 50, 101, 152; the first two: 16, 26 as well

_C.BN = CfgNode()
_C.BN.USE_PRECISE_STATS = False  # recompute BN statistics before validation, test and checkpoint
_C.BN.NUM_BATCHES_PRECISE = 200  # batches used for that
_C.BN.NORM_TYPE = "batchnorm"  # batchnorm: each rank's own statistics; sync_batchnorm: those of all ranks (GPUs only)
_C.BN.WEIGHT_DECAY = 0.0  # weight decay of BN parameters; -1: same as SOLVER.WEIGHT_DECAY

_C.SOLVER = CfgNode()
_C.SOLVER.OPTIMIZING_METHOD = "sgd"  # sgd, adamw
_C.SOLVER.BASE_LR = 0.01  # learning rate of the whole job (not per GPU), after warm-up
_C.SOLVER.LR_POLICY = "steps_with_relative_lrs"  # steps_with_relative_lrs, cosine, plateau
_C.SOLVER.MAX_EPOCH = 45  # length of training in RUNNER.SCHEDULE_UNIT
_C.SOLVER.STEPS = [0]  # starts of the stages of steps_with_relative_lrs, first 0, in RUNNER.SCHEDULE_UNIT
_C.SOLVER.LRS = [1.0]  # learning rate of each stage, as a factor of BASE_LR
_C.SOLVER.COSINE_END_LR = 0.0  # learning rate at the end of the cosine
_C.SOLVER.WARMUP_EPOCHS = 0.0  # linear warm-up, in RUNNER.SCHEDULE_UNIT
_C.SOLVER.WARMUP_START_LR = 0.001  # learning rate at its start
_C.SOLVER.MOMENTUM = 0.9  # of SGD
_C.SOLVER.DAMPENING = 0.0  # of SGD
_C.SOLVER.NESTEROV = True  # of SGD
_C.SOLVER.BETAS = [0.9, 0.999]  # of AdamW
_C.SOLVER.WEIGHT_DECAY = 1e-4  # of weights
_C.SOLVER.ZERO_WD_1D_PARAM = False  # no weight decay for biases and other 1-D parameters
_C.SOLVER.CLIP_GRAD_VAL = 0.0  # clip each gradient entry to ±this; 0: off
_C.SOLVER.CLIP_GRAD_L2NORM = 0.0  # clip the global gradient norm to this; 0: off

_C.DETECTION = CfgNode()
_C.DETECTION.ENABLE = False  # classify persons' boxes in keyframes (AVA, KEYFRAMES) instead of whole clips
_C.DETECTION.ALIGNED = True  # RoIAlign without its old shift by half a cell
_C.DETECTION.SPATIAL_SCALE_FACTOR = 0  # stride that ROI.LAYER must have, pixels; 0: whatever it is
_C.DETECTION.ROI_XFORM_RESOLUTION = 7  # cells of a box on each side, over which the maximum is taken

_C.TENSORBOARD = CfgNode()
_C.TENSORBOARD.ENABLE = False  # write scalars, first filters and confusion matrices for TensorBoard
_C.TENSORBOARD.LOG_DIR = ""  # under OUTPUT_DIR; empty: "tensorboard"

# ---------------------------------------------------------------------------------------------- the plugin's own nodes
_C.NETWORK = CfgNode()  # switches of the registered networks (the student)
_C.NETWORK.MODALITY = "rgb"  # what the student sees: "rgb", or "flow" (u and v; DATA.MEAN and STD have 2 entries)
_C.NETWORK.VARIANT = "vmz"  # Res3D, R2Plus1D: "vmz" or "torchvision" (mid-planes and BN eps together)
_C.NETWORK.WIDTH = 64  # channels of the first stage; 64 is the papers'
_C.NETWORK.STEM_POOL = False  # Res3D: 1×3×3 max-pool after conv1, as in the 2D ResNet (the paper's Res3D has none)
_C.NETWORK.TEMPORAL_PADDING = "zeros"  # "zeros" or "replicate": padding in time
_C.NETWORK.PADDING = "same"  # "same": TensorFlow's; "symmetric": as torchvision's GoogLeNet (I3D) and S3D (S3DG) pad
_C.NETWORK.AFFINE_NORM = False  # BN with a factor as well as a summand; needed when inflated from an image network
_C.NETWORK.FULLY_CONVOLUTIONAL = False  # logits of every 7×7 window of maps larger than that, averaged
_C.NETWORK.STEM_FRAMES = 3  # temporal size of S3DG's first kernel: 1, 3, 5 or 7 (7 in the paper, 3 in its code)
_C.NETWORK.SEPARABLE_STEM = False  # split the first convolution, too, into space and time (torchvision's S3D)
_C.NETWORK.TEMPORAL_NORM = False  # BN in place of a bias after temporal convolutions (torchvision's S3D)
_C.NETWORK.TEMPORAL_FROM = "2C"  # first end-point with temporal kernels: 2C, 3B … 5C (or Mixed_3b …); "none"
_C.NETWORK.GATING_FROM = "2C"  # first end-point with feature gates: as above; "none": S3D without gates
_C.NETWORK.STREAMS = "both"  # of TwoStream and Fused3D: "both", or "rgb" or "flow" alone
_C.NETWORK.LAST_LAYER = "5C"  # end-point after which S3DG ends: 1A … 5C (or TF-slim's names); 3A for a flow network
_C.NETWORK.DECODER = "pwc"  # PredictedFlow3D: decoder of flow at 3A: simple, spatial, pwc
_C.NETWORK.DECODER_NORM = False  # PredictedFlow3D: batch normalisation in that decoder

_C.INIT = CfgNode()  # initialisation other than TRAIN.CHECKPOINT_FILE_PATH
_C.INIT.INFLATE_FROM = ""  # 2D network to inflate ("torchvision/googlenet", "timm/resnet50", "Res2D"); empty: off
_C.INIT.INFLATE_WEIGHTS = ""  # that network's weights: torchvision tag, "timm" (timm's own), or file
_C.INIT.FLOW_NET_WEIGHTS = ""  # PredictedFlow3D: a run whose teacher of ARCH flow was decoded at 3A; empty: random
_C.INIT.STREAM_WEIGHTS = ""  # PredictedFlow3D: an S3DG that was trained on flow; empty: random
_C.INIT.TRAINABLE = "all"  # "all"; "classifier": the last layer alone; "heads": new heads of DISTILL.TEACHERS alone

_C.CORPUS = CfgNode()
_C.CORPUS.TRAIN = CfgNode(new_allowed=True)  # NAME: {FORMAT, PATH, …} (see CORPUS_ENTRY); several are mixed by WEIGHT
_C.CORPUS.VAL = CfgNode(new_allowed=True)  # the same for validation; empty: no validation
_C.CORPUS.TEST = CfgNode(new_allowed=True)  # the same for the test
_C.CORPUS.SPLIT = 1  # split of UCF-101 and HMDB-51: 1, 2 or 3
_C.CORPUS.TARGET_FPS = 0.0  # resample videos to this frame rate by their time stamps; 0: native frames
_C.CORPUS.TEST_SCALE = 0  # short side from which test crops are cut, pixels; 0: DATA.TEST_CROP_SIZE
_C.CORPUS.TEST_NUM_FRAMES = 0  # frames of a test clip, where they are others than in training; 0: DATA.NUM_FRAMES
_C.CORPUS.TEST_CLIPS = "uniform"  # "uniform": TEST.NUM_ENSEMBLE_VIEWS clips; "dense": one every CORPUS.DENSE_STRIDE
_C.CORPUS.DENSE_STRIDE = 1  # frames between the starts of dense clips
_C.CORPUS.DECODE_TIMEOUT = 30.0  # seconds that one file may take before it counts as bad
_C.CORPUS.MAX_BAD_FRACTION = 0.1  # the job stops when more (and 3) of its videos of one use are bad
_C.CORPUS.INDEX_CACHE = ""  # folder for the time stamps of videos already seen; empty: OUTPUT_DIR/frame_index

_C.KEYFRAMES = CfgNode()  # what the AVA node of PySlowFast cannot say
_C.KEYFRAMES.VIDEO_DIR = ""  # folder of one video file for each name in the csv files; empty: AVA.FRAME_DIR
_C.KEYFRAMES.VIDEO_START = 0.0  # time stamp of the first picture of those files, seconds; 900: cut as for AVA's frames
_C.KEYFRAMES.FRAMES_START = 900.0  # time stamp of the first extracted frame, seconds
_C.KEYFRAMES.FRAMES_FPS = 30.0  # extracted frames per second
_C.KEYFRAMES.SECONDS = [902.0, 1798.0]  # first and last time stamp that are used
_C.KEYFRAMES.LABEL_IOU = (
    0.0  # predicted training boxes without actions take those of overlapping annotated ones; 0: off
)
_C.KEYFRAMES.TEST_BOXES = "predicted"  # validation, test: "predicted" or "ground_truth" boxes are classified

_C.FLOW = CfgNode()  # optical flow, where a network sees it
_C.FLOW.STORE = ""  # folder that distinit extract-flow wrote; empty: flow is computed from the frames, on the device
_C.FLOW.LAYOUT = "store"  # of that folder; of other programs: "jpg" (denseflow's) or "npy" (I3D's), coded as below
_C.FLOW.MISSING = "refuse"  # a video that is not in FLOW.STORE: "refuse" it as a bad one, or compute its flow "live"
_C.FLOW.BACKEND = "tvl1"  # what computes it: tvl1, dual_tvl1, dis_medium, dis_fast, raft
_C.FLOW.WEIGHTS = ""  # of raft: a file, or a torchvision tag
_C.FLOW.RAFT_SIZE = "large"  # "large" or "small"
_C.FLOW.BOUND = 20.0  # flow of [-BOUND, BOUND] pixels is coded in bytes; more is cut off
_C.FLOW.ROUNDING = "round"  # "round" (0 is coded 128) or "floor" (127, as in I3D's data)

CORPUS_ENTRY = CfgNode()
"""Keys of one named node below CORPUS.TRAIN, CORPUS.VAL or CORPUS.TEST."""
CORPUS_ENTRY.FORMAT = "folder"  # folder, list, csv, ucf101, hmdb51, kinetics, frames
CORPUS_ENTRY.PATH = ""  # the folder, list file or csv
CORPUS_ENTRY.ROOT = ""  # where the videos are, when PATH is a list or a folder of split files
CORPUS_ENTRY.SUBSET = ""  # "train" or "test" of UCF-101 and HMDB-51; a split name of a Kinetics csv; empty: by use
CORPUS_ENTRY.LABELED = False  # take the labels; False: labels are dropped where there are any
CORPUS_ENTRY.CLASSES = ""  # file of class names, one per line (csv, kinetics); folder: empty means sub-folders
CORPUS_ENTRY.WEIGHT = 1.0  # share of training clips drawn from this corpus, relative to the others; 0 < w; -1: by size

_C.DISTILL = CfgNode()
_C.DISTILL.TEACHERS = CfgNode(new_allowed=True)  # NAME: {ARCH, WEIGHTS, …} (see TEACHER_ENTRY)
_C.DISTILL.GATE = "weight"  # examples above MAX_ENTROPY: "weight" 0 (the paper), or "skip" them before the student
_C.DISTILL.GATE_MEAN = "all"  # the loss is the mean over "all" examples of the batch or over the "kept" ones

_C.DISTILL.GRID = CfgNode()  # enumerated clips and crops of each video, which is what targets can be cached for
_C.DISTILL.GRID.CLIPS = 0  # a training clip is one of this many evenly spaced ones of its video; 0: any clip
_C.DISTILL.GRID.CROPS = 0  # its crop is one of 1 or 3 as in a test (and, with DATA.RANDOM_FLIP, mirrored); 0: any crop
_C.DISTILL.GRID.SCALE = 0  # short side for those and for VIEW center, pixels; 0: middle of DATA.TRAIN_JITTER_SCALES
_C.DISTILL.GRID.FRAMES = 0  # FRAME_PICK chooses among this many evenly spaced frames of the clip; 0: all

TEACHER_ENTRY = CfgNode()
"""Keys of one named node below DISTILL.TEACHERS."""
TEACHER_ENTRY.ARCH = "torchvision/resnet50"  # "torchvision/NAME", "timm/NAME", a registered network; "flow": no network
TEACHER_ENTRY.WEIGHTS = "IMAGENET1K_V1"  # torchvision tag, "timm" (its default weights), file, or "random"
TEACHER_ENTRY.NUM_CLASSES = 1000  # classes of the teacher's classifier
TEACHER_ENTRY.DEPTH = 18  # of a registered network as teacher
TEACHER_ENTRY.CFG = ""  # ARCH slowfast/NAME: its YAML file; empty: what WEIGHTS says about its network
TEACHER_ENTRY.NETWORK = _C.NETWORK.clone()  # switches of a registered network as teacher: the keys of NETWORK
TEACHER_ENTRY.LAYER = (
    "logits"  # what is matched: logits, features, feature_map (the last map), a layer (4F); flow (of ARCH flow)
)
TEACHER_ENTRY.STUDENT_LAYER = ""  # logits, features or a layer of the student; empty: LAYER's, or chosen for HEAD
TEACHER_ENTRY.HEAD = "linear"  # a new layer (1×1×1 for maps); "own": the student's logits; simple, spatial, pwc: flow
TEACHER_ENTRY.LOSS = "soft_cross_entropy"  # soft_cross_entropy, kl, mse, cosine; flow_decoding (of ARCH flow)
TEACHER_ENTRY.LOSS_WEIGHT = 1.0  # factor of this term; 0: switched off
TEACHER_ENTRY.TEMPERATURE = 1.0  # τ of equation 1, divides the teacher's logits
TEACHER_ENTRY.TEMPER_STUDENT = False  # τ divides the student's logits too
TEACHER_ENTRY.SCALE_BY_TEMPERATURE = False  # multiply the loss by τ²
TEACHER_ENTRY.CLASS_REDUCTION = "mean"  # mse: "mean" or "sum" over classes (or feature dimensions)
TEACHER_ENTRY.NORMALIZE = "none"  # mse: "none"; "variance": divided by the target's; "standardize": both sides first
TEACHER_ENTRY.WARMUP = 0.0  # LOSS_WEIGHT rises linearly from 0 over this, in RUNNER.SCHEDULE_UNIT; 0: off
TEACHER_ENTRY.MAX_ENTROPY = -1.0  # nats; examples whose teacher entropy is at or above it are gated; -1: no gate
TEACHER_ENTRY.FRAME_PICK = "center"  # center, keyframe, random, uniform (of the clip's frames), or clip: all of them
TEACHER_ENTRY.NUM_PICKED_FRAMES = 1  # frames per clip; their logits are averaged before the softmax
TEACHER_ENTRY.VIEW = "shared"  # "shared": the student's crop and flip; "center": the centre crop of the same frames
TEACHER_ENTRY.CACHE = (
    ""  # folder of distinit cache-targets: the teacher's outputs are read, it is not built; empty: off
)
TEACHER_ENTRY.CROP_SIZE = 224  # pixels at which the teacher sees the clip's crop
TEACHER_ENTRY.MEAN = [0.485, 0.456, 0.406]  # per-channel mean of the teacher's input
TEACHER_ENTRY.STD = [0.229, 0.224, 0.225]  # per-channel standard deviation
TEACHER_ENTRY.ALIGNMENT = "center"  # ARCH flow: a slice of several frames has the "center" one's flow, or their "mean"
TEACHER_ENTRY.DECODER_NORM = False  # ARCH flow: batch normalisation in the decoders spatial and pwc

_C.ACTION = CfgNode()
_C.ACTION.LOSS = "cross_entropy"  # loss on labels; bce: on the actions of boxes, with DETECTION.ENABLE
_C.ACTION.LOSS_WEIGHT = 0.0  # factor of the action term; 0: labels are not needed
_C.ACTION.LABEL_SMOOTHING = 0.0  # [0, 1)

_C.ROI = CfgNode()  # how boxes are found and classified, with DETECTION.ENABLE
_C.ROI.LAYER = ""  # layer of MODEL.MODEL_NAME whose map is pooled ("4F"), several joined by "+"; empty: the last one
_C.ROI.POOL = "avg"  # "avg" or "max": over the time steps of that map
_C.ROI.DILATION = False  # the network's last stage keeps the resolution of the one before, with dilated kernels
_C.ROI.PROPOSALS = "given"  # boxes: "given" by files; of a frozen "rpn" on the keyframe (RPN); of an "own" RPN on LAYER
_C.ROI.REFINE_BOXES = False  # learn one correction per box, whatever the action; not of given boxes
_C.ROI.SAMPLES = 64  # boxes that a training step draws from the proposals of each keyframe
_C.ROI.POSITIVE_SHARE = 0.25  # at most this share of them are of persons, the others background; (0, 1]
_C.ROI.MATCH_IOU = 0.5  # overlap with an annotated box from which on a proposal is of that person
_C.ROI.BOX_LOSS_WEIGHT = 1.0  # factor of the corrections' loss, with REFINE_BOXES; above 0
_C.ROI.PROPOSAL_LOSS_WEIGHT = 1.0  # factor of the loss of an "own" RPN; above 0
_C.ROI.SCORE_FLOOR = 0.0  # test: detections below are left out, [0, 1)
_C.ROI.NMS = 0.6  # test of proposals: of two boxes of one action that overlap more, the better one stays; 1: both
_C.ROI.MAX_DETECTIONS = 100  # test: best detections (box × action) of a keyframe that are kept; 0: all
_C.ROI.EVALUATOR = "official"  # rules of frame-mAP: "official"; "pyslowfast" or "mmaction2" as those count

_C.RPN = CfgNode()  # region proposals of persons: MODEL.MODEL_NAME PersonRpn (distinit train-rpn), or ROI.PROPOSALS
_C.RPN.ARCH = "resnet50_fpn"  # trunk: resnet18, resnet50 (a map of stride 16), resnet18_fpn, resnet50_fpn(_v2)
_C.RPN.WEIGHTS = (
    ""  # file of train-rpn or of a Faster R-CNN or ResNet of torchvision, or a tag (COCO_V1); empty: random
)
_C.RPN.FROZEN_NORM = False  # batch normalisation stays as WEIGHTS has it, statistics and all
_C.RPN.CROP_SIZE = 224  # of the keyframe that it sees beside a student, pixels (training: the crop; test: short side)
_C.RPN.MEAN = [0.485, 0.456, 0.406]  # per-channel mean of its input
_C.RPN.STD = [0.229, 0.224, 0.225]  # per-channel standard deviation
_C.RPN.ANCHOR_SIZES = [32.0, 64.0, 128.0, 256.0, 512.0]  # roots of the areas of anchors, pixels (of an "own" RPN, too)
_C.RPN.NUM_PROPOSALS = 100  # per keyframe, at most
_C.RPN.NMS = 0.7  # of two proposals that overlap by more the better one is kept
_C.RPN.SCORE_FLOOR = 0.0  # least score of a proposal, [0, 1]

_C.RUNNER = CfgNode()
_C.RUNNER.CLIPS_PER_EPOCH = 0  # clips (all ranks together) that make an epoch; 0: the corpus once
_C.RUNNER.SCHEDULE_UNIT = "epoch"  # unit of SOLVER.MAX_EPOCH, STEPS, WARMUP_EPOCHS: "epoch" or "step"
_C.RUNNER.ACCUMULATE = 1  # micro-batches per optimizer step; TRAIN.BATCH_SIZE is divided by it
_C.RUNNER.PRECISION = "auto"  # auto (bf16 where the hardware has it and is right, else fp32), fp32, bf16, fp16
_C.RUNNER.CHECK_CONVOLUTIONS = True  # compare each distinct bf16/fp16 convolution with fp32 once and repair
_C.RUNNER.CHANNELS_LAST = "auto"  # auto (where it is faster), on, off: memory format of 5-D tensors
_C.RUNNER.COMPILE = False  # torch.compile the student
_C.RUNNER.FLUSH_DENORMALS = True  # treat denormal floats as zero (decides the speed on CPUs)
_C.RUNNER.KEEP_MEMORY = True  # on CPUs: keep freed memory for the next step (up to twice as fast; holds the peak)
_C.RUNNER.DETERMINISTIC = False  # exact reproduction: fp32, deterministic algorithms, no COMPILE
_C.RUNNER.DRY_RUN = False  # print shapes, parameters, GMACs, memory, clips/s and the expected duration, then stop
_C.RUNNER.NUM_THREADS = 0  # CPU threads per rank; 0: torch's default (a fair share where ranks are started)
_C.RUNNER.CPU_RANKS = 1  # processes that share the job on each machine's CPU (with NUM_GPUS 0); ≥ 1
_C.RUNNER.INIT_METHOD = ""  # tcp://ADDRESS:PORT of shard 0, where the shards meet; empty: one shard, on a free port
_C.RUNNER.JOIN_TIMEOUT = 600.0  # seconds that the shards wait for one another at the start; ≥ 1
_C.RUNNER.COLLECTIVE_TIMEOUT = 1800.0  # seconds that a rank waits for the others (for a checkpoint, too) at most; ≥ 1
_C.RUNNER.PLATEAU_PATIENCE = 2  # plateau policy: epochs without a lower validation (else training) loss before a drop
_C.RUNNER.PLATEAU_FACTOR = 0.1  # by this factor
_C.RUNNER.KEEP_CHECKPOINTS = 0  # newest epoch checkpoints to keep; 0: all
_C.RUNNER.RESUME_MINUTES = 10.0  # minutes between states within an epoch; 0: only on signals and before validations
_C.RUNNER.PROGRESS = True  # progress bar on a terminal

# Entries of these nodes have the user's names; each starts with every key of its template.
_C.DISTILL.TEACHERS.set_template(TEACHER_ENTRY, required="ARCH")
for _corpora in (_C.CORPUS.TRAIN, _C.CORPUS.VAL, _C.CORPUS.TEST):
    _corpora.set_template(CORPUS_ENTRY, required="PATH")


def get_cfg() -> CfgNode:
    """A fresh copy of the defaults."""
    return _C.clone()
