"""`python -m mojomesh_features`."""

from mojomesh_chassis.fast_lane import FastLane
from mojomesh_chassis.serving import serve
from mojomesh_features.app import build
from mojomesh_features.settings import FeaturesSettings

if __name__ == "__main__":
    serve("features", build, FeaturesSettings, FastLane)
