"""Command that prints the cost of a train step by part of the model, on this machine or on an absent mesh.

python -m gptjax.plan --config=configs/base.py --measure
python -m gptjax.plan --config=configs/gpt3.py:175b --mesh=data=8,fsdp=64,tensor=8 --chip=h100
"""

import argparse
import json
import math
from collections.abc import Sequence

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, console, runtime

EPILOG = """without --measure, --mesh, --chip and --search the costs follow from shapes and nothing is compiled; no text
is read and no run is written; every key of the recipe can be set with --config.KEY=VALUE"""
MAX_DEVICES = 100_000  # virtual ones
PRINTED, COMPILED = 10, 3  # of the meshes ranked by --search


def main(argv: Sequence[str]) -> None:
    """Parses the flags and prints the plan."""
    about = "Prints the cost of a train step: parameters, FLOPs and time, measured on this machine or predicted."
    parser = arguments.Parser(prog="python -m gptjax.plan", description=about, epilog=EPILOG)
    parser.add_argument("--config", metavar="RECIPE", required=True, help="Python file such as configs/base.py")
    parser.add_argument("--measure", action="store_true", help="time some steps on random tokens")
    parser.add_argument("--steps", type=arguments.number(), metavar="N", help="steps to time, and to trace; default: 5")
    parser.add_argument("--mesh", metavar="AXES", help="mesh of virtual devices, such as data=8,fsdp=64,tensor=8")
    parser.add_argument("--chip", metavar="NAME", help="chip of the mesh: h100, v5p, ..., or here (measured)")
    parser.add_argument("--search", action="store_true", help="rank the meshes of --devices that the run fits on")
    parser.add_argument("--devices", type=arguments.number(most=MAX_DEVICES), metavar="N", help="devices for --search")
    flags, overrides = parser.parse_known_args(argv)
    if flags.steps is not None and (flags.steps < 1 or not flags.measure):
        raise ConfigError("--steps must be at least 1, and needs --measure")
    if flags.mesh or flags.chip or flags.search or flags.devices is not None:
        plan_mesh(flags, overrides)
        return
    runtime.start()
    from gptjax.planning import costs
    from gptjax.runs import config

    recipe = config.read(flags.config, overrides)
    result = costs.plan(recipe, (flags.steps or 5) if flags.measure else 0)
    if flags.json:
        for row in costs.rows(result):
            print(json.dumps(row))
    else:
        print(costs.as_text(result))


def plan_mesh(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints the plan for a mesh of chips, or for the best meshes of a search."""
    if not flags.chip:
        raise ConfigError("--mesh and --search need --chip, such as --chip=h100")
    if flags.measure and (flags.chip != "here" or flags.search):
        raise ConfigError("--measure needs --chip=here and a single --mesh")
    too_few = flags.devices is not None and flags.devices < 1
    if too_few or flags.search == (flags.devices is None) or (flags.search and flags.mesh):
        raise ConfigError("--search needs --devices=N, at least 1, and no --mesh")
    runtime.start()
    from gptjax.planning import virtual_devices
    from gptjax.runs import config

    virtual_devices.check_chip(flags.chip)
    axes = virtual_devices.parse_mesh(flags.mesh) if flags.mesh else None
    recipe = config.read(flags.config, overrides)
    mesh = axes or {axis: max(size, 1) for axis, size in recipe.mesh.items()}
    devices = flags.devices or math.prod(mesh.values())
    virtual_devices.create(devices, flags.chip)
    from gptjax.planning import compiled_plan, costs, meshes, plan_table

    resolved = costs.resolve(compiled_plan.with_mesh(recipe, {} if flags.search else mesh))
    chip = virtual_devices.get_chip(flags.chip, resolved, devices)
    if not flags.search:
        console.say(f"compiling for {devices:,} devices")
        measured = None
        if flags.measure:
            result, measured = compiled_plan.compile_and_measure(resolved, chip, flags.steps or 5)
        else:
            result = compiled_plan.compile_plan(resolved, chip)
        print(json.dumps(plan_table.as_dict(result, measured)) if flags.json else plan_table.as_text(result, measured))
        return
    with console.bar("searching", len(meshes.candidate_meshes(resolved, devices))) as advance:
        ranked = meshes.search(resolved, devices, chip, advance)
    if not ranked:
        raise ConfigError(f"no mesh of {devices} {flags.chip} fits; use more devices, or --config.model.remat=full")
    if not flags.json:
        print(plan_table.ranking(ranked, PRINTED))
    with console.bar("compiling", min(COMPILED, len(ranked))) as advance:
        best = []
        for one in ranked[:COMPILED]:
            best.append(compiled_plan.compile_plan(one.config, chip))
            advance(1)
    if flags.json:
        objects = {"ranked": [*map(plan_table.candidate_dict, ranked)]}
        print(json.dumps(objects | {"compiled": [*map(plan_table.as_dict, best)]}))
    else:
        print("\n\n".join(["", *map(plan_table.as_text, best)]))


if __name__ == "__main__":
    arguments.run(main)
