"""python -m gptjax.plan --config=configs/base.py --measure: what a train step costs, part by part of the model.
python -m gptjax.plan --config=configs/gpt3.py:175b --mesh=data=8,fsdp=64,tensor=8 --chip=h100: on what is not here.

Flags in, gptjax.planning.costs.plan or gptjax.planning.compiled_plan called, their tables printed.
"""

import argparse
import json
import math
from collections.abc import Sequence

from gptjax import config
from gptjax.config.errors import ConfigError
from gptjax.core import arguments, console, runtime

EPILOG = """without --measure, --mesh, --chip and --search only what follows from shapes is printed, and nothing is
compiled; no text is read and no run is written; every key of the recipe can be set with --config.KEY=VALUE"""
MOST_DEVICES = 100_000  # virtual ones
SHOWN, COMPILED = 10, 3  # of the meshes that --search ranks


def main(argv: Sequence[str]) -> None:
    """Plans as the flags say."""
    about = "Tells what a train step costs: parameters, FLOPs and, measured on this machine or foreseen, time."
    parser = arguments.Parser(prog="python -m gptjax.plan", description=about, epilog=EPILOG)
    parser.add_argument("--config", metavar="RECIPE", required=True, help="Python file such as configs/base.py")
    parser.add_argument("--measure", action="store_true", help="run some steps on random tokens and tell their time")
    parser.add_argument(
        "--steps", type=arguments.number(), metavar="N", help="steps to time, and as many again to trace; default: 5"
    )
    parser.add_argument("--mesh", metavar="AXES", help="such as data=8,fsdp=64,tensor=8; compiled for virtual devices")
    parser.add_argument("--chip", metavar="NAME", help="each device of the mesh: h100, v5p, ..., or here, measured")
    parser.add_argument("--search", action="store_true", help="rank the meshes of --devices on which the run fits")
    parser.add_argument("--devices", type=arguments.number(most=MOST_DEVICES), metavar="N", help="of --search")
    flags, overrides = parser.parse_known_args(argv)
    if flags.steps is not None and (flags.steps < 1 or not flags.measure):
        raise ConfigError("--steps must be at least 1, and goes with --measure")
    if flags.mesh or flags.chip or flags.search or flags.devices is not None:
        plan_elsewhere(flags, overrides)
        return
    chosen = config.read(flags.config, overrides)
    runtime.start()
    from gptjax.planning import costs

    found = costs.plan(chosen, (flags.steps or 5) if flags.measure else 0)
    if flags.json:
        for row in costs.rows(found):
            print(json.dumps(row))
    else:
        print(costs.as_text(found))


def plan_elsewhere(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Plans for a mesh of chips, or for the best of those there could be."""
    if not flags.chip:
        raise ConfigError("--mesh and --search need --chip, such as --chip=h100")
    if flags.measure and (flags.chip != "here" or flags.search):
        raise ConfigError("only --chip=here can be measured, on one --mesh")
    few = flags.devices is not None and flags.devices < 1
    if few or flags.search == (flags.devices is None) or (flags.search and flags.mesh):
        raise ConfigError("--search goes with --devices=N, at least 1, and without --mesh")
    runtime.start()
    from gptjax.planning import virtual_devices

    virtual_devices.check_chip(flags.chip)
    given = virtual_devices.mesh(flags.mesh) if flags.mesh else None
    chosen = config.read(flags.config, overrides)
    mesh = given or {axis: max(size, 1) for axis, size in chosen.mesh.items()}
    devices = flags.devices or math.prod(mesh.values())
    virtual_devices.start(devices, flags.chip)
    from gptjax.planning import compiled_plan, costs, meshes, plan_table

    planned = costs.planned(compiled_plan.with_mesh(chosen, {} if flags.search else mesh))
    chip = virtual_devices.chip(flags.chip, planned, devices)
    if not flags.search:
        console.say(f"compiling for {devices:,} devices")
        measured = None
        if flags.measure:
            found, measured = compiled_plan.compared(planned, chip, flags.steps or 5)
        else:
            found = compiled_plan.scaled(planned, chip)
        print(json.dumps(plan_table.as_object(found, measured)) if flags.json else plan_table.as_text(found, measured))
        return
    with console.bar("searching", len(meshes.meshes(planned, devices))) as advance:
        ranked = meshes.search(planned, devices, chip, advance)
    if not ranked:
        raise ConfigError(f"no mesh of {devices} {flags.chip} fits; take more devices, or --config.model.remat=full")
    if not flags.json:
        print(plan_table.ranking(ranked, SHOWN))
    with console.bar("compiling", min(COMPILED, len(ranked))) as advance:
        best = []
        for one in ranked[:COMPILED]:
            best.append(compiled_plan.scaled(one.config, chip))
            advance(1)
    if flags.json:
        objects = {"ranked": [*map(plan_table.candidate_object, ranked)]}
        print(json.dumps(objects | {"compiled": [*map(plan_table.as_object, best)]}))
    else:
        print("\n\n".join(["", *map(plan_table.as_text, best)]))


if __name__ == "__main__":
    arguments.run(main)
