"""The published system's prompt, out of a clone of it, as a file for --prompt.

    git clone https://github.com/IntelLabs/DeepMath published
    python extras/published_prompt.py published --out published.json
    python agent.py --model Intel/deepmath-v1 --prompt published.json "What is 7^222 mod 1000?"

Intel/deepmath-v1 was trained with that prompt: instructions with four solved examples as the system
message, and the question after one word. The text is theirs, so it is read there and not kept here.
The clone's Python is parsed, never run.
"""

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, first_line, parse, run_main  # noqa: E402

INSTRUCTION, TEMPLATE = "agent_math_instruction", "simple_template"  # as configs/training.yaml says


@dataclass
class Flags:
    """Write the published prompt as a file for --prompt."""

    clone: tyro.conf.Positional[Path]
    """Folder of a clone of github.com/IntelLabs/DeepMath."""
    out: Path = Path("published.json")
    """The file to write."""


def read_clone(clone: Path) -> dict:
    """The prompt as read_prompt_file wants it. Raises UserError where the clone is not one."""
    package = clone / "deep_math"
    try:
        examples = (package / "fewshot.txt").read_text(encoding="utf-8")
        tree = ast.parse((package / "prompts.py").read_text(encoding="utf-8"))
        found = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                found[node.targets[0].id] = node.value.value
        system = found[INSTRUCTION].format(examples=examples)
        user = found[TEMPLATE].format(question="{question}")
    except (OSError, SyntaxError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{clone} is no clone of IntelLabs/DeepMath: {first_line(error)}") from None
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"source": f"{INSTRUCTION} of github.com/IntelLabs/DeepMath", "messages": messages}


def main() -> None:
    flags = parse(Flags)
    prompt = read_clone(flags.clone)
    flags.out.write_text(json.dumps(prompt, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{flags.out}: give it as --prompt {flags.out}")


if __name__ == "__main__":
    run_main(main)
