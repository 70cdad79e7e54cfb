"""A user's program that is wrong in every marked line: by a rule of pyright, a code of mypy."""

import firsttok as ft
from firsttok.keys import KeySource
from firsttok.tensors import Intervention

model = ft.load(15)  # wrong: reportArgumentType, arg-type
ft.load("smollm2-135m", device=0)  # wrong: reportArgumentType, arg-type
fact = ft.Fact("England", "{} is", "Berlin", "London")  # wrong: reportCallIssue, call-arg
fact.subject = "France"  # wrong: reportAttributeAccessIssue, misc
ft.sample_contexts(model, seed="0")  # wrong: reportArgumentType, arg-type
ft.capture_keys(model, "England", layers=[0])  # wrong: reportArgumentType, arg-type
ft.capture_key(model, [fact], layers=[0])  # wrong: reportAttributeAccessIssue, attr-defined
ft.compute_edit(model, fact, method=ft.ROME)  # wrong: reportCallIssue, call-arg
ft.perplexity(model, text="England")  # wrong: reportCallIssue, call-arg
ft.Hyperparameters(steps="25")  # wrong: reportArgumentType, arg-type
ft.ROME.direction = ft.Slot.UNPREFIXED  # wrong: reportAttributeAccessIssue, misc
middle = ft.Slot.MIDDLE  # wrong: reportAttributeAccessIssue, attr-defined
edit = ft.load_edit("edit.safetensors")
edit.apply(model)  # wrong: reportAttributeAccessIssue, attr-defined
below = edit.report.denominater  # wrong: reportAttributeAccessIssue, attr-defined
total: str = ft.perplexity(model).mean  # wrong: reportAssignmentType, assignment
model.intervened("swap")  # wrong: reportArgumentType, arg-type
source: KeySource = ft.ROME  # wrong: reportAssignmentType, assignment
view: Intervention = model  # wrong: reportAssignmentType, assignment
