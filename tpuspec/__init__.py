"""tpuspec: the TPUEstimatorSpec contract for PyTorch on XLA."""

from tpuspec import export, metrics, summary
from tpuspec.config import CaptureMode, InputPipelineConfig, RunConfig, TPUConfig
from tpuspec.export.receiver import ServingInputReceiver
from tpuspec.hosts.launch_info import LaunchInfo, launch_info
from tpuspec.schedule import early_stopping
from tpuspec.schedule.exporters import BestExporter, Exporter, FinalExporter, LatestExporter
from tpuspec.schedule.specs import EvalSpec, TrainSpec
from tpuspec.schedule.train_and_evaluate import train_and_evaluate
from tpuspec.spec.estimator_spec import EstimatorSpec, TPUEstimatorSpec
from tpuspec.spec.export_output import ClassificationOutput, PredictOutput, RegressionOutput
from tpuspec.spec.functions import InputFn, ModelFn
from tpuspec.spec.hooks import CheckpointSaverListener, HookContext, SessionRunHook
from tpuspec.spec.host_call import HostCall
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.scaffold import Scaffold
from tpuspec.spec.train_op import CrossShardOptimizer, TrainOp, constrain
from tpuspec.spec.warm_start import VocabInfo, WarmStartSettings
from tpuspec.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "BestExporter",
    "CaptureMode",
    "CheckpointSaverListener",
    "ClassificationOutput",
    "CrossShardOptimizer",
    "EstimatorSpec",
    "EvalSpec",
    "Exporter",
    "FinalExporter",
    "HookContext",
    "HostCall",
    "InputFn",
    "InputPipelineConfig",
    "LatestExporter",
    "LaunchInfo",
    "ModeKeys",
    "ModelFn",
    "PredictOutput",
    "RegressionOutput",
    "RunConfig",
    "Scaffold",
    "ServingInputReceiver",
    "SessionRunHook",
    "TPUConfig",
    "TPUEstimatorSpec",
    "TrainOp",
    "TrainSpec",
    "Trainer",
    "VocabInfo",
    "WarmStartSettings",
    "constrain",
    "early_stopping",
    "export",
    "launch_info",
    "metrics",
    "summary",
    "train_and_evaluate",
]
