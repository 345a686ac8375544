"""fuse, Handle, explain."""


class Handle:
    def remove(self): ...
    def __enter__(self):
        return self

    def __exit__(self, *e):
        self.remove()


def fuse(model):
    return Handle()


def explain(model):
    return []
