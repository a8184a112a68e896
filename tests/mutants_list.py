"""The faults of ``mutants.py``: what stands in a file, what is put in its place, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: what it does, in a few words.
        file: below ``lightning_kd``.
        old: text that stands there exactly once.
        new: what is put in its place.
        tests: files, folders or tests that are run, the likeliest first.
        harmless: why no test need notice. Such faults are left out unless asked for.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    harmless: str = ""


KD = ("tests/distillation",)
NOISY = "tests/noisy_labels"
POOL = "tests/active_learning"
FLAT = "tests/flatness"
CONFIGS = "tests/test_configs.py"

MUTANTS = [
    # distillation
    Mutant("KD without the squared temperature", "distillation/kd.py", "temperature**2 *", "temperature *", KD),
    Mutant(
        "KD with teacher and student swapped",
        "distillation/kd.py",
        "difference = (log_teacher - log_student)",
        "difference = (log_student - log_teacher)",
        KD,
    ),
    Mutant(
        "DKD with the weights of its parts swapped",
        "distillation/dkd.py",
        "alpha * tckd + beta * nckd",
        "beta * tckd + alpha * nckd",
        KD,
    ),
    Mutant(
        "DKD's warm-up one epoch late",
        "distillation/dkd.py",
        "min((self.current_epoch + 1) / max",
        "min((self.current_epoch) / max",
        KD,
    ),
    Mutant(
        "BinaryKL without the other half",
        "distillation/dhkd.py",
        "temperature**2 * (on + off).sum(1)",
        "temperature**2 * on.sum(1)",
        KD,
    ),
    Mutant(
        "gradients aligned where they agree",
        "distillation/dhkd.py",
        "torch.where((dot < 0) &",
        "torch.where((dot > 0) &",
        KD,
    ),
    Mutant(
        "DHKD stops distilling an epoch late",
        "distillation/dhkd.py",
        "self.current_epoch + 1 >= self.stop_epoch",
        "self.current_epoch + 1 > self.stop_epoch",
        KD,
    ),
    Mutant(
        "both losses on the main head",
        "distillation/dhkd.py",
        "self.distillation_loss(head_logits, teacher_logits",
        "self.distillation_loss(logits, teacher_logits",
        KD,
    ),
    Mutant(
        "gradients of the processes summed, not averaged",
        "distillation/dhkd.py",
        "                    grad /= dist.get_world_size()\n",
        "",
        KD,
    ),
    # noisy labels
    Mutant(
        "GCE with the wrong sign of the power",
        "noisy_labels/gce.py",
        "-(q * log_p).expm1()",
        "-(-q * log_p).expm1()",
        (f"{NOISY}/test_losses.py", NOISY),
    ),
    Mutant(
        "reverse cross-entropy added up with the wrong sign",
        "noisy_labels/sce.py",
        "- beta * log_zero *",
        "+ beta * log_zero *",
        (f"{NOISY}/test_losses.py", NOISY),
    ),
    Mutant(
        "complementary labels may be the label",
        "noisy_labels/negative_learning.py",
        "generator.integers(1, num_classes,",
        "generator.integers(0, num_classes,",
        (NOISY,),
    ),
    Mutant(
        "co-teaching keeps its own choice",
        "noisy_labels/coteaching.py",
        "zip(each, reversed(chosen), strict=True)",
        "zip(each, chosen, strict=True)",
        (f"{NOISY}/test_coteaching.py",),
    ),
    Mutant(
        "the forget rate's ramp one epoch longer",
        "noisy_labels/coteaching.py",
        "epoch / max(ramp_epochs - 1, 1)",
        "epoch / max(ramp_epochs, 1)",
        (f"{NOISY}/test_losses.py", f"{NOISY}/test_coteaching.py"),
    ),
    Mutant(
        "MixUp mixes labels the other way",
        "noisy_labels/mixup.py",
        "weight * F.cross_entropy(logits, target) + (1 - weight) * F.cross_entropy(logits, partner_target)",
        "(1 - weight) * F.cross_entropy(logits, target) + weight * F.cross_entropy(logits, partner_target)",
        (f"{NOISY}/test_losses.py", NOISY),
    ),
    Mutant(
        "ELR's memory moves at the wrong rate",
        "noisy_labels/elr.py",
        "momentum * memory.rows[index] + (1 - momentum)",
        "(1 - momentum) * memory.rows[index] + momentum",
        (f"{NOISY}/test_elr.py",),
    ),
    Mutant(
        "ELR's regularizer without gradient",
        "noisy_labels/elr.py",
        "memory_rows.detach() * _clamped(logits)",
        "memory_rows.detach() * _clamped(logits).detach()",
        (f"{NOISY}/test_elr.py", f"{NOISY}/test_losses.py"),
    ),
    Mutant(
        "ELR+ asks its own averaged copy",
        "noisy_labels/elr.py",
        "other = self.averaged_logits(1 - k, image)",
        "other = self.averaged_logits(k, image)",
        (f"{NOISY}/test_elr.py",),
    ),
    Mutant(
        "ELR+ forgets its steps on resume",
        "noisy_labels/elr.py",
        '        self.steps_done = list(checkpoint["steps_done"])\n',
        "        pass\n",
        (f"{NOISY}/test_elr.py",),
    ),
    Mutant(
        "DPC's divergence without its weight",
        "noisy_labels/dpc.py",
        '"kl": self.beta / self.num_classes * dirichlet_kl',
        '"kl": self.beta * dirichlet_kl',
        (f"{NOISY}/test_dpc.py", NOISY),
    ),
    Mutant(
        "networks split by their own verdict",
        "noisy_labels/dividemix.py",
        "self.clean.rows[:, 1 - k].cpu()",
        "self.clean.rows[:, k].cpu()",
        (f"{NOISY}/test_two_networks.py", f"{NOISY}/test_dpc.py"),
    ),
    Mutant(
        "labels refined by the own verdict",
        "noisy_labels/dividemix.py",
        "self.clean.rows[labelled.index, 1 - k]",
        "self.clean.rows[labelled.index, k]",
        (f"{NOISY}/test_two_networks.py", f"{NOISY}/test_dpc.py"),
    ),
    Mutant(
        "guesses from one network alone",
        "noisy_labels/dividemix.py",
        "sharpen((own + other.sum(0)) / (2 * len(views))",
        "sharpen(own / len(views)",
        (f"{NOISY}/test_two_networks.py", f"{NOISY}/test_dpc.py"),
    ),
    Mutant(
        "the unsupervised weight rises from epoch 0",
        "noisy_labels/dividemix.py",
        "linear_ramp(epoch, self.warmup_epochs, self.ramp_epochs)",
        "linear_ramp(epoch, 0, self.ramp_epochs)",
        (f"{NOISY}/test_two_networks.py", f"{NOISY}/test_dpc.py"),
    ),
    Mutant(
        "both networks in train mode",
        "noisy_labels/two_networks.py",
        "part.train(other == k)",
        "part.train(True)",
        (f"{NOISY}/test_two_networks.py", NOISY),
    ),
    Mutant(
        "separation loss trains u",
        "noisy_labels/_bidirectional.py",
        "predicted + added.detach() - taken",
        "predicted + added - taken",
        (f"{NOISY}/test_bldr.py",),
    ),
    Mutant(
        "consistency pulls the weak view too",
        "noisy_labels/_bidirectional.py",
        "at_least_float32(weak_logits.detach(), strong_logits)",
        "at_least_float32(weak_logits, strong_logits)",
        (f"{NOISY}/test_bldr.py",),
    ),
    # active learning and its books
    Mutant(
        "unknown samples at the temperature of known ones",
        "active_learning/lfosa.py",
        "masked_fill(target >= num_known, unknown_temperature)",
        "masked_fill(target > num_known, unknown_temperature)",
        (f"{POOL}/test_lfosa.py",),
    ),
    Mutant(
        "margin sampling buys the surest",
        "active_learning/baselines.py",
        "return -probability_margin(_probabilities(scores))",
        "return probability_margin(_probabilities(scores))",
        (f"{POOL}/test_baselines.py",),
    ),
    Mutant(
        "a picked row stays in the pool",
        "active_learning/greedy.py",
        "        self.near[row] = -torch.inf\n",
        "        self.near[row] = 0\n",
        (f"{POOL}/test_greedy.py",),
    ),
    Mutant(
        "distances are to the farthest centre",
        "active_learning/greedy.py",
        "torch.minimum(self.near[part], value.add_",
        "torch.maximum(self.near[part], value.add_",
        (f"{POOL}/test_greedy.py",),
    ),
    Mutant(
        "complementary label of BUAL may be the label",
        "active_learning/_bidirectional.py",
        "(given + 1 + draw) % num_known",
        "(given + draw) % num_known",
        (f"{POOL}/test_bual.py",),
    ),
    Mutant(
        "DCFS reduces the discrepancy of unknown samples",
        "active_learning/dcfs.py",
        "(head_discrepancy(first, second, measure) * (known - unknown))",
        "(head_discrepancy(first, second, measure) * (known + unknown))",
        (f"{POOL}/test_dcfs.py",),
    ),
    Mutant(
        "a query is drawn from another stream each time",
        "active_learning/rounds.py",
        'numpy_generator(global_seed(), "query", data.round)',
        "np.random.default_rng()",
        (f"{POOL}/test_rounds.py", f"{POOL}/test_baselines.py"),
    ),
    Mutant(
        "a broken round is kept",
        "active_learning/rounds.py",
        "        remove_round(round_folder)  # what a broken one left\n",
        "        pass\n",
        (f"{POOL}/test_rounds.py", f"{POOL}/test_commands.py"),
    ),
    Mutant(
        "a finished round is not written down",
        "active_learning/rounds.py",
        "            record.save()  # from here on the round is done\n",
        "            pass\n",
        (f"{POOL}/test_rounds.py",),
    ),
    Mutant(
        "each round has the seed of the first",
        "active_learning/rounds.py",
        "L.seed_everything(seed + number,",
        "L.seed_everything(seed,",
        (f"{POOL}/test_rounds.py", f"{POOL}/test_commands.py"),
    ),
    Mutant(
        "answers may be lost",
        "pool/record.py",
        "            if lost:\n",
        "            if False:\n",
        ("tests/pool", f"{POOL}/test_commands.py"),
    ),
    Mutant(
        "a sample may be bought twice", "pool/record.py", "        if again:\n", "        if False:\n", ("tests/pool",)
    ),
    # flatness
    Mutant(
        "the shift keeps what is off the inputs",
        "flatness/_row_space.py",
        "            return weight @ self.basis @ self.basis.T, bias\n",
        "            return weight - weight @ self.basis @ self.basis.T, bias\n",
        (f"{FLAT}/test_optimum_shifting.py",),
    ),
    Mutant(
        "mode free forgets the bias",
        "flatness/_row_space.py",
        "bias + (weight - shifted) @ self.mean",
        "bias",
        (f"{FLAT}/test_optimum_shifting.py",),
    ),
    Mutant(
        "the rank counts small directions",
        "flatness/_row_space.py",
        "sigma > max(rtol * float(sigma.max()), floor)",
        "sigma >= min(rtol * float(sigma.max()), floor)",
        (f"{FLAT}/test_optimum_shifting.py",),
    ),
    Mutant(
        "SAM goes down first",
        "flatness/sam.py",
        "torch._foreach_mul_(gradients, rho / (norm + self._tiny))",
        "torch._foreach_mul_(gradients, -rho / (norm + self._tiny))",
        (f"{FLAT}/test_sam.py",),
    ),
    Mutant(
        "SAM stays where it climbed",
        "flatness/sam.py",
        "                torch._foreach_copy_(parameters, kept)\n",
        "                pass\n",
        (f"{FLAT}/test_sam.py",),
    ),
    Mutant(
        "SAM loses its links on resume",
        "flatness/sam.py",
        "        self._share()  # torch puts new containers there\n",
        "        pass\n",
        (f"{FLAT}/test_sam.py", f"{FLAT}/test_kill.py"),
    ),
    Mutant(
        "the same gradient noise in every step",
        "flatness/gradient_noise.py",
        'torch_generator(seed, "gradient noise", trainer.global_step, device',
        'torch_generator(seed, "gradient noise", 0, device',
        (f"{FLAT}/test_gradient_noise.py",),
    ),
    # metrics
    Mutant(
        "NC1 without the mean of all",
        "metrics/head.py",
        "(mean - feature.mean(0))",
        "mean",
        ("tests/metrics/test_head.py",),
    ),
    Mutant(
        "recall over what was chosen",
        "metrics/label_noise.py",
        '"recall of the selection of labels", hits, existing',
        '"recall of the selection of labels", hits, chosen',
        ("tests/metrics/test_label_noise.py",),
    ),
    Mutant(
        "calibration errors cancel",
        "metrics/calibration.py",
        "(correct - confidence).abs().sum()",
        "(correct - confidence).sum().abs()",
        ("tests/metrics/test_calibration.py",),
    ),
    Mutant(
        "Lanczos without its second term",
        "metrics/curvature.py",
        "            product -= beta[-1] * basis[i - 1]\n",
        "            product += beta[-1] * basis[i - 1]\n",
        ("tests/metrics/test_curvature.py",),
        "the full orthogonalisation that follows takes the term out whatever its size",
    ),
    Mutant(
        "the smallest eigenvalues reported as the largest",
        "metrics/curvature.py",
        "values.flip(0)[:k]",
        "values[:k]",
        ("tests/metrics/test_curvature.py",),
    ),
    Mutant(
        "the trace stops at ten times the tolerance",
        "metrics/traces.py",
        "error <= tolerance * abs(",
        "error <= 10 * tolerance * abs(",
        ("tests/metrics/test_curvature.py",),
    ),
    # core: seeds, memories, averages, the run folder
    Mutant(
        "the same dropout in every epoch",
        "core/seeding.py",
        'derive_seed(self.seed, "global", trainer.current_epoch, rank',
        'derive_seed(self.seed, "global", 0, rank',
        ("tests/core/test_seeding.py", "tests/test_resume.py"),
    ),
    Mutant(
        "no reseeding at all",
        "core/seeding.py",
        "        torch.manual_seed(state)\n",
        "",
        ("tests/core/test_seeding.py", "tests/test_resume.py"),
    ),
    Mutant(
        "every rank draws alike",
        "core/seeding.py",
        "entropy = [seed, zlib.crc32(stream.encode()), epoch, pass_, rank]",
        "entropy = [seed, zlib.crc32(stream.encode()), epoch, pass_]",
        ("tests/core/test_seeding.py",),
    ),
    Mutant(
        "the average moves the wrong way",
        "core/averaging.py",
        "torch._foreach_lerp_(mine, theirs, 1 - decay)",
        "torch._foreach_lerp_(mine, theirs, decay)",
        ("tests/core/test_averaging.py",),
    ),
    Mutant(
        "memories forget what a checkpoint says",
        "core/memory.py",
        "        self.rows = rows.to(self.rows.device, self.dtype)\n",
        "        pass\n",
        ("tests/core/test_memory.py", f"{NOISY}/test_elr.py"),
    ),
    Mutant(
        "memories of other ranks are not taken",
        "core/memory.py",
        "        self.rows[index.to(self.rows.device)] = rows.to(self.rows.device)\n",
        "",
        ("tests/core/test_memory.py", NOISY),
    ),
    Mutant(
        "gathered rows keep their order of arrival",
        "core/distributed.py",
        "np.unique(parts[0].numpy(), return_index=True)[1]",
        "np.arange(len(parts[0]))",
        ("tests/core/test_distributed.py",),
    ),
    Mutant(
        "two networks' gradients summed over processes",
        "core/distributed.py",
        "    joint /= dist.get_world_size()\n",
        "",
        ("tests/core/test_distributed.py",),
    ),
    Mutant(
        "metrics of a repeated epoch stay", "core/run.py", "< epoch]", "<= epoch]", ("tests/test_resume.py", CONFIGS)
    ),
    Mutant(
        "a resumed run has lost its earlier rows",
        "core/run.py",
        "            if self.file.is_file():\n                with",
        "            if False:\n                with",
        ("tests/test_resume.py", "tests/test_cli.py"),
    ),
    Mutant(
        "no checkpoint before the first epoch",
        "core/run.py",
        "            trainer.save_checkpoint(self.run.last)\n",
        "            pass\n",
        ("tests/test_resume.py",),
    ),
    Mutant(
        "best.ckpt moves with worse epochs",
        "core/run.py",
        "            moved.update(dirpath=self.dirpath,",
        "            dict().update(dirpath=self.dirpath,",
        ("tests/test_cli.py",),
    ),
    Mutant(
        "history of commands is dropped",
        "core/run.py",
        '"history": [*history, earlier] if earlier else history,',
        '"history": [],',
        ("tests/test_cli.py", "tests/test_quickstart.py"),
    ),
    Mutant(
        "the loss of evaluation not by its samples",
        "core/task.py",
        'metrics["loss"].update(loss, len(scores))',
        'metrics["loss"].update(loss)',
        ("tests/core/test_task.py",),
    ),
    Mutant(
        "training means of this process alone",
        "core/task.py",
        'reduce_op="sum").tolist()\n            for name',
        'reduce_op="mean").tolist()\n            for name',
        ("tests/distillation/test_modules.py", "tests/noisy_labels"),
        "a mean over processes of sums and of counts divides both by the same number",
    ),
    Mutant(
        "the teacher in train mode",
        "core/teacher.py",
        "return super().train(False)",
        "return super().train(mode)",
        ("tests/core/test_teacher.py",),
    ),
    Mutant(
        "the teacher in checkpoints",
        "core/teacher.py",
        "        del state_dict[key]\n",
        "        pass\n",
        ("tests/core/test_teacher.py",),
    ),
    Mutant(
        "a checkpoint without its teacher is refused",
        "core/teacher.py",
        "        state_dict.setdefault(key, value)\n",
        "        pass\n",
        ("tests/core/test_teacher.py",),
    ),
    Mutant(
        "the logits of a tuple are its last entry",
        "core/outputs.py",
        "output[0] if output else None",
        "output[-1] if output else None",
        ("tests/core/test_outputs.py",),
    ),
    # data
    Mutant(
        "every epoch in the same order",
        "data/sampling.py",
        'numpy_generator(self.seed, "shuffle", epoch, pass_)',
        'numpy_generator(self.seed, "shuffle", 0, pass_)',
        ("tests/data/test_sampling.py",),
    ),
    Mutant(
        "all ranks take the first part",
        "data/sampling.py",
        "self.rank * self.batch_size\n",
        "0\n",
        ("tests/data/test_sampling.py",),
    ),
    Mutant(
        "crops never at the far edge",
        "data/augment.py",
        "        side = 2 * self.padding + 1\n        return",
        "        side = 2 * self.padding\n        return",
        ("tests/data/test_augment.py",),
    ),
    Mutant(
        "cutout one pixel off",
        "data/augment.py",
        "(middle[:, None] - side // 2)",
        "(middle[:, None] - side // 2 + 1)",
        ("tests/data/test_augment.py",),
    ),
    # the command line
    Mutant(
        "resume goes on without its checkpoint",
        "trainer_cli.py",
        'config["ckpt_path"] = str(folder.checkpoint(config["ckpt_path"]))',
        'config["ckpt_path"] = None',
        ("tests/test_resume.py", CONFIGS),
    ),
    Mutant(
        "a finished fit is trained over",
        "trainer_cli.py",
        'if anew and folder.last.is_file() and not config["overwrite"]',
        'if False and not config["overwrite"]',
        ("tests/test_cli.py",),
    ),
]
