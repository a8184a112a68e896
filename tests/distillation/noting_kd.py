"""KD that remembers what it logged of its teacher."""

from lightning_kd import KD


class NotingKD(KD):
    """``teacher_acc`` holds an (epoch, value) for each time that ``val/teacher_acc`` was logged."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher_acc = []

    def log(self, name, value, **options):
        if name == "val/teacher_acc":
            self.teacher_acc.append((self.current_epoch, value))
        super().log(name, value, **options)
