def draw(results, rows, args):
    return []
